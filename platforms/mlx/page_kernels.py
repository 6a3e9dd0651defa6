"""Generic kernels over pages, in MLX's own operations.

Storage is head by head: keys (heads * S, dim), see `common/ops/page_gather.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from ...common.ops.page_digest import SEED, STRIDE
from .sampler import mix32

BITS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}
"""Unsigned dtype by bytes."""


def page_gather(
    keys: mx.array, values: mx.array, pages: mx.array, heads: int, page_size: int
) -> tuple[mx.array, mx.array]:
    blocks = keys.shape[0] // (heads * page_size)
    # Of every head's pages in one list: MLX's CPU backend takes along a later axis far more slowly.
    first = mx.arange(0, heads * blocks, blocks, dtype=mx.uint32)[:, None]
    where = first + pages.reshape(1, -1).astype(mx.uint32)
    found = [_gathered(storage, where, pages.shape, page_size) for storage in (keys, values)]
    return found[0], found[1]


def _gathered(
    storage: mx.array, where: mx.array, shape: tuple[int, ...], page_size: int
) -> mx.array:
    """`where` (heads, R * P): blocks of the storage. -> (R, heads, P * page_size, dim)."""
    (rows, columns), dim = shape, storage.shape[1]
    blocks = storage.reshape(storage.shape[0] // page_size, page_size * dim)
    found = mx.take(blocks, where.reshape(-1), axis=0)
    return found.reshape(len(where), rows, columns * page_size, dim).swapaxes(0, 1)


def page_digest(pool: mx.array, pages: mx.array) -> mx.array:
    count = pool.size // pool.shape[0]
    found = mx.contiguous(mx.take(pool, pages, axis=0))
    bits = found.view(BITS[pool.itemsize]).reshape(len(pages), count).astype(mx.uint32)
    k = mix32(mx.arange(count, dtype=mx.uint32) * STRIDE + SEED)
    a = mix32(k ^ bits)
    return mx.stack([a.sum(axis=1), mix32(a + k).sum(axis=1)], axis=1)


def fused(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    mask: mx.array,
    sinks: mx.array | None,
) -> mx.array:
    return mx.fast.scaled_dot_product_attention(
        queries, keys, values, scale=scale, mask=mask, sinks=sinks
    )


def paged_attention(
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
    attend: Callable[..., mx.array] = fused,
) -> mx.array:
    """`attend`: softmax attention over what was gathered."""
    if not len(q):
        return mx.zeros((*q.shape[:2], values.shape[1]), q.dtype)
    found, found_values = page_gather(keys, values, pages, kv_heads, page_size)
    position = mx.arange(found.shape[2], dtype=mx.int32)[None]
    ends = lengths.astype(mx.int32)[:, None]
    seen = position < ends
    if window:
        seen = seen & (position >= ends - window)
    # What is hidden gets the weight 0, which a NaN survives.
    every = seen[:, None, :, None]
    found, found_values = (mx.where(every, x, 0.0).astype(x.dtype) for x in (found, found_values))
    sinks = None if sinks is None else sinks.astype(q.dtype)
    result = attend(q[:, :, None], found, found_values, scale, seen[:, None, None], sinks)[:, :, 0]
    return mx.where((ends > 0)[..., None], result, 0.0).astype(q.dtype)
