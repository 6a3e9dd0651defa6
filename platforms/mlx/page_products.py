"""Decode attention as products of blocks of pages that are read where they lie.

`mx.gather_mm` multiplies by matrices that indices name, so no key is gathered first. Its cost is
one call for each block: pages that are neighbours in every row are taken as one larger block, by a
view in which a block begins at every page.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx

from .powers import power_of_two
from .softmax_attention import LOG2_E, LOWEST

RUN = 8
"""Pages of a larger block."""
ONLY_FLOAT32 = "mx.gather_mm multiplies float32 only on a CPU"


@dataclass(frozen=True, slots=True)
class Part:
    """Blocks of one size: N of each row, of K keys."""

    pages: int  # of a block
    hidden: mx.array  # (R, 1, N, 1, K) float32
    where: mx.array  # (R * G, N) uint32 places in the list of every head's blocks
    rows: mx.array  # (R * G, N) uint32 whose queries
    each: mx.array  # (R * G, N) uint32 one after the other


@dataclass(frozen=True, slots=True)
class Blocks:
    """Which keys the rows read. Every slot of a page named here holds a number."""

    pages: mx.array  # (R, P) uint32
    hidden: mx.array  # (R, P * page_size) float32: 0, or -inf where a row does not see
    runs: int  # the first `runs * RUN` columns are neighbours, RUN at a time, in every row
    page_size: int
    _made: dict[tuple[int, int], list[Part]] = field(default_factory=dict)

    def parts(self, slots: int, heads: int) -> list[Part]:
        """The large and the small blocks in a storage of so many slots. Made once: all layers of a
        step have the same."""
        if (slots, heads) not in self._made:
            end = self.runs * RUN
            keys = end * self.page_size
            large = self.pages[:, :end:RUN], self.hidden[:, :keys], RUN
            small = self.pages[:, end:], self.hidden[:, keys:], 1
            self._made[slots, heads] = [
                self._part(*part, slots, heads) for part in (large, small) if part[0].shape[1]
            ]
        return self._made[slots, heads]

    def _part(self, first: mx.array, hidden: mx.array, pages: int, slots: int, heads: int) -> Part:
        rows, count = first.shape
        size = self.page_size
        begins = mx.arange(0, slots // size, slots // (heads * size), dtype=mx.uint32)
        where = (first[:, None] + begins[:, None]).reshape(-1, count)
        each = mx.arange(where.size, dtype=mx.uint32).reshape(where.shape)
        rows_of = mx.broadcast_to(mx.arange(rows * heads, dtype=mx.uint32)[:, None], where.shape)
        return Part(pages, hidden.reshape(rows, 1, count, 1, -1), where, rows_of, each)


def attend(
    q: mx.array,
    keys: mx.array,
    values: mx.array,
    blocks: Blocks,
    kv_heads: int,
    scale: float,
    sinks: mx.array | None = None,
) -> mx.array:
    """q (R, H, Dk); keys (kv_heads * slots, Dk) and values (.., Dv), head by head, float32, as in
    `common/ops/paged_attention.py` -> (R, H, Dv). A row that sees nothing gets zeros."""
    rows, heads, dim = q.shape
    group = heads // kv_heads
    grouped = (q * (scale * LOG2_E)).reshape(rows * kv_heads, group, dim)
    found = []
    for part in blocks.parts(len(keys), kv_heads):
        stored = _blocks(keys, part.pages, blocks.page_size).swapaxes(1, 2)
        logits = mx.gather_mm(grouped, stored, part.rows, part.where)
        shape = rows, kv_heads, part.where.shape[1], group, part.hidden.shape[-1]
        found.append((logits.reshape(shape) + part.hidden, part))
    best = mx.array(LOWEST)
    limit = None
    if sinks is not None:
        limit = (sinks.astype(mx.float32) * LOG2_E).reshape(1, kv_heads, 1, group, 1)
        best = mx.maximum(limit, LOWEST)
    for logits, _ in found:
        best = mx.maximum(best, logits.max(axis=(2, 4), keepdims=True))
    total = 0.0 if limit is None else power_of_two(limit - best).sum(axis=(2, 4))
    made: mx.array | float = 0.0
    for logits, part in found:
        weights = power_of_two(logits - best)
        total = total + weights.sum(axis=(2, 4))
        made = made + _weighed(weights, _blocks(values, part.pages, blocks.page_size), part)
    # Where nothing is seen the sum is 0; elsewhere it is at least 1.
    made = made / mx.maximum(total, 0.5)[..., None]
    return made.reshape(rows, heads, values.shape[1])


def hiding(lengths: mx.array, keys: int, window: int) -> mx.array:
    """lengths (R,) -> (R, keys) float32: what is added to the logits of one query at each end."""
    position, ends = mx.arange(keys, dtype=mx.int32)[None], lengths[:, None]
    seen = position < ends
    if window:
        seen = seen & (position >= ends - window)
    return mx.where(seen, 0.0, -mx.inf)


def over_any_pages(
    q: mx.array,
    keys: mx.array,
    values: mx.array,
    pages: mx.array,
    lengths: mx.array,
    kv_heads: int,
    page_size: int,
    scale: float,
    window: int = 0,
    sinks: mx.array | None = None,
) -> mx.array:
    """The op `paged_attention`, whatever lies in slots without a token."""
    if not len(q):
        return mx.zeros((*q.shape[:2], values.shape[1]), q.dtype)
    keys, values = (mx.where(mx.isnan(x), 0.0, x) for x in (keys, values))
    hidden = hiding(lengths, pages.shape[1] * page_size, window)
    blocks = Blocks(pages.astype(mx.uint32), hidden, 0, page_size)
    return attend(q, keys, values, blocks, kv_heads, scale, sinks)


def _weighed(weights: mx.array, stored: mx.array, part: Part) -> mx.array:
    """weights (R, G, N, H, K) of blocks (.., K, Dv) -> (R, G, H, Dv)."""
    rows, groups, count, heads, length = weights.shape
    made = mx.gather_mm(weights.reshape(-1, heads, length), stored, part.each, part.where)
    return made.reshape(rows, groups, count, heads, -1).sum(axis=2)


def _blocks(storage: mx.array, pages: int, size: int) -> mx.array:
    """(.., pages * size, dim): one block from every page on."""
    slots, dim = storage.shape
    if pages == 1:
        return storage.reshape(slots // size, size, dim)
    shape = slots // size - pages + 1, pages * size, dim
    return mx.as_strided(storage, shape, (size * dim, dim, 1))
