"""`page_gather` in one launch: a page of one head is one block, both here and there, so a
threadgroup copies one block of keys and one of values."""

from __future__ import annotations

from math import prod

import mlx.core as mx

from .launch import Launch, Launcher, MetalSource

THREADS = 128
WORDS = {8: mx.uint64, 4: mx.uint32, 2: mx.uint16, 1: mx.uint8}

# blocks: pages of one head in the storage; columns: pages of one row.
SOURCE = MetalSource(
    name="page_gather",
    inputs=("keys", "values", "pages", "heads", "blocks", "key_words", "value_words"),
    outputs=("key_out", "value_out"),
    body="""
    const uint column = threadgroup_position_in_grid.y;
    const uint columns = threadgroups_per_grid.y;
    const uint row = threadgroup_position_in_grid.z / uint(heads);
    const uint head = threadgroup_position_in_grid.z % uint(heads);
    const size_t page = size_t(pages[row * columns + column]);
    const size_t source = size_t(head) * size_t(blocks) + page;
    const size_t target = size_t(threadgroup_position_in_grid.z) * columns + column;
    const uint first = thread_position_in_threadgroup.x;
    const uint step = threads_per_threadgroup.x;
    for (uint i = first; i < uint(key_words); i += step)
      key_out[target * uint(key_words) + i] = keys[source * uint(key_words) + i];
    for (uint i = first; i < uint(value_words); i += step)
      value_out[target * uint(value_words) + i] = values[source * uint(value_words) + i];
    """,
)


def page_gather(
    launch: Launcher,
    keys: mx.array,
    values: mx.array,
    pages: mx.array,
    heads: int,
    page_size: int,
) -> tuple[mx.array, mx.array]:
    rows, columns = pages.shape
    storages = (keys, values)
    shapes = [(rows, heads, columns * page_size, x.shape[1]) for x in storages]
    if not prod(pages.shape):
        return mx.zeros(shapes[0], keys.dtype), mx.zeros(shapes[1], values.dtype)
    word = _word([x.shape[1] * x.itemsize for x in storages])
    words = [page_size * x.shape[1] * x.itemsize // word.size for x in storages]
    blocks = keys.shape[0] // (heads * page_size)
    scalars = [mx.array(n, mx.int32) for n in (heads, blocks, *words)]
    call = Launch(
        inputs=[*(x.view(word) for x in storages), pages, *scalars],
        template=[],
        threads=(THREADS, columns, rows * heads),
        group=THREADS,
        shapes=[(rows * heads * columns * n,) for n in words],
        dtypes=[word, word],
    )
    found = [out.view(x.dtype) for out, x in zip(launch(SOURCE, call), storages, strict=True)]
    return found[0].reshape(shapes[0]), found[1].reshape(shapes[1])


def _word(row_bytes: list[int]) -> mx.Dtype:
    """The widest word that storage rows are whole numbers of."""
    return next(word for size, word in WORDS.items() if not any(n % size for n in row_bytes))
