"""Decode attention that reads keys and values in their pages: one query a row goes to the kernel of
`paged_attention`, or to products of blocks of pages (`page_products.py`); all else to attention
over gathered arrays.

MLX is lazy: what a stand-in cache gathered for a layer is never computed if nobody reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from ...common.errors import KernelError
from ..interface import Decision
from ..interface_kernels import Kernel
from . import page_products
from .caches import InPlace, PagedCache
from .page_kernels import page_gather

OP = "paged_attention"
WHAT = "decode attention"
GATHERED, IN_PAGES, PRODUCTS = "over gathered pages", "in pages", "products"
"""The forms; `--kernel paged_attention=products` names the last, a kernel's provider the second."""
LITTLE = 1.1
"""How many times faster products must be: they are no kernel, and round as gathered pages do."""
ROWS, KEYS, HEADS, KV_HEADS, DIM, PAGE = 8, 512, 8, 2, 64, 16
"""Of the step that is timed."""
Attend = Callable[..., mx.array]
Reader = Callable[[mx.array, InPlace, float, mx.array | None], mx.array]


def by_kernel(kernel: Kernel) -> Reader:
    def read(q: mx.array, found: InPlace, scale: float, sinks: mx.array | None) -> mx.array:
        made: mx.array = kernel.fn(
            q, found.keys, found.values, found.pages, found.lengths,
            found.heads, found.page_size, scale, found.window, sinks,
        )  # fmt: skip
        return made

    return read


def by_products(q: mx.array, found: InPlace, scale: float, sinks: mx.array | None) -> mx.array:
    return page_products.attend(
        q, found.keys, found.values, found.blocks, found.heads, scale, sinks
    )


def in_pages(reader: Reader, gathered: Attend) -> Attend:
    """What mlx-lm's attention function is called for; `gathered` has its arguments too."""

    def attend(
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        cache: Any,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        found = None
        if queries.shape[2] == 1 and isinstance(cache, PagedCache):
            found = cache.in_place(keys, values, mask)
        if found is None or found.keys.dtype != queries.dtype:
            return gathered(queries, keys, values, cache, scale=scale, mask=mask, sinks=sinks)
        return reader(queries[:, :, 0], found, scale, sinks)[:, :, None]

    return attend


def choose(
    kernel: Kernel,
    gathered: Attend,
    dtype: mx.Dtype,
    wanted: Mapping[str, str],
    clock: Callable[..., list[float]],
    gain: float,
) -> tuple[Attend | None, Decision]:
    """The attention function, None for `gathered` itself, and why. `clock`: seconds of each of some
    ways; the kernel must be `gain` times as fast as gathered pages, or named by the user. Raises
    KernelError when products are named for a dtype that they do not have."""
    readers: dict[str, Reader] = {IN_PAGES: by_kernel(kernel)}
    if dtype == mx.float32:
        readers[PRODUCTS] = by_products
    if OP in wanted:
        name = PRODUCTS if wanted[OP] == PRODUCTS else IN_PAGES
        if name not in readers:
            raise KernelError(f"--kernel {OP}={PRODUCTS}: {page_products.ONLY_FLOAT32}.")
        return in_pages(readers[name], gathered), Decision(
            WHAT, name, f"{OP} was named by the user"
        )
    step, over_gathered = _toy(dtype, gathered)
    ways = [partial(read, *step) for read in readers.values()]
    seconds = dict(zip((GATHERED, *readers), clock([over_gathered, *ways]), strict=True))
    name = _fastest(seconds, {IN_PAGES: gain, PRODUCTS: LITTLE})
    because = f"{seconds[name] * 1e3:.2f} ms at this start ({kernel.provider} kernel)"
    others = tuple(
        (other, f"{took * 1e3:.2f} ms, slower or too little faster")
        for other, took in seconds.items()
        if other != name
    )
    made = None if name == GATHERED else in_pages(readers[name], gathered)
    return made, Decision(WHAT, name, because, others)


def _fastest(seconds: Mapping[str, float], gains: Mapping[str, float]) -> str:
    """The quickest of those that gain enough over gathered pages."""
    own = seconds[GATHERED]
    able = [name for name, gain in gains.items() if seconds.get(name, own) * gain < own]
    return min(able, key=lambda name: seconds[name], default=GATHERED)


def _toy(dtype: mx.Dtype, gathered: Attend) -> tuple[tuple[Any, ...], Callable[[], Any]]:
    """Arguments of a reader, over pages as a fresh pool gives them, and the same step gathered."""
    rng = np.random.default_rng(0)
    columns = KEYS // PAGE
    slots = KV_HEADS * (ROWS * columns + 1) * PAGE
    shapes = ((ROWS, HEADS, DIM), (slots, DIM), (slots, DIM))
    q, keys, values = (
        mx.array(rng.standard_normal(shape).astype(np.float32)).astype(dtype) for shape in shapes
    )
    order = 1 + np.arange(ROWS * columns).reshape(ROWS, columns)
    pages, lengths = mx.array(order.astype(np.uint32)), mx.full((ROWS,), KEYS, mx.int32)
    seen = mx.ones((ROWS, 1, 1, KEYS), mx.bool_)
    runs = columns // page_products.RUN
    blocks = page_products.Blocks(pages, mx.zeros((ROWS, KEYS)), runs, PAGE)
    mx.eval(q, keys, values, pages, lengths, seen, blocks.hidden)
    found = InPlace(keys, values, pages, lengths, KV_HEADS, PAGE, 0, blocks)

    def over_gathered() -> mx.array:
        stored = page_gather(keys, values, pages, KV_HEADS, PAGE)
        return gathered(q[:, :, None], *stored, None, scale=DIM**-0.5, mask=seen, sinks=None)

    return (q, found, DIM**-0.5, None), over_gathered
