"""Softmax attention in parts: products, a maximum, powers of two and a sum, block by block.

`mx.fast.scaled_dot_product_attention` is one kernel on a GPU. Where MLX has no such kernel it
computes every logit of a causal prompt, the half that is hidden included, and takes `exp` of each,
which its CPU backend has without vectors. In parts, a block of queries sees only the keys up to its
own end, and exp(x) is 2^(x / ln 2). `forms.py` measures which of the two is faster here.
"""

from __future__ import annotations

import math
from functools import cache

import mlx.core as mx
import numpy as np

from .powers import power_of_two

LOG2_E = math.log2(math.e)
BLOCK = 64
"""Queries of a causal block: their logits stay in a cache, the products stay large."""
LOWEST = -1e30
"""Below every logit that is seen; a query that sees nothing is compared with it."""


def attend(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """queries (R, H, S, Dk), keys (R, G, K, Dk), values (R, G, K, Dv) -> (R, H, S, Dv); query head
    h reads kv head h // (H / G). `mask`: None (all is seen), "causal" (the last query stands at the
    last key), bool (True is seen) or what is added to the logits, either of a shape that broadcasts
    to (R, H, S, K). `sinks` (H,): one more logit of each head, of a key whose value is zero.
    A query that sees nothing gets zeros."""
    rows, heads, count, dim = queries.shape
    groups, length = keys.shape[1], keys.shape[2]
    # Heads that read the same keys stand side by side, so that no key is repeated.
    grouped = (queries * (scale * LOG2_E)).reshape(rows, groups, heads // groups, count, dim)
    keys = keys.swapaxes(-1, -2)
    limits = None
    if sinks is not None:
        limits = (sinks.astype(mx.float32) * LOG2_E).reshape(1, groups, -1, 1, 1)
    if not isinstance(mask, str):
        shifts = None if mask is None else _shifts(mask, groups)
        made = _block(grouped, keys, values, shifts, limits)
        return made.reshape(rows, heads, count, values.shape[-1])
    blocks = []
    for first in range(0, count, BLOCK):
        last = min(count, first + BLOCK)
        seen = length - count + last
        shifts = _causal(last - first, seen) if last - first > 1 else None
        some = grouped[:, :, :, first:last]
        blocks.append(_block(some, keys[..., :seen], values[:, :, :seen], shifts, limits))
    made = blocks[0] if len(blocks) == 1 else mx.concatenate(blocks, axis=3)
    return made.reshape(rows, heads, count, values.shape[-1])


def _block(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    shifts: mx.array | None,
    limits: mx.array | None,
) -> mx.array:
    """queries (R, G, N, S, Dk) in powers of two; keys (R, G, Dk, K) -> (R, G, N, S, Dv)."""
    rows, groups, heads, count, dim = queries.shape
    length = keys.shape[-1]
    logits = queries.reshape(rows, groups, heads * count, dim) @ keys
    logits = logits.reshape(rows, groups, heads, count, length).astype(mx.float32)
    if shifts is not None:
        logits = logits + shifts
    best = mx.maximum(logits.max(axis=-1, keepdims=True), LOWEST)
    if limits is not None:
        best = mx.maximum(best, limits)
    weights = power_of_two(logits - best)
    total = weights.sum(axis=-1, keepdims=True)
    if limits is not None:
        total = total + power_of_two(limits - best)
    weights = weights.astype(values.dtype).reshape(rows, groups, heads * count, length)
    made = (weights @ values).reshape(rows, groups, heads, count, values.shape[-1])
    # Where nothing is seen the sum is 0; elsewhere it is at least 1.
    return (made / mx.maximum(total, 0.5)).astype(queries.dtype)


def _causal(count: int, length: int) -> mx.array:
    """(count, length), what is added to the logits of the last `count` positions."""
    before = mx.zeros((count, length - count), mx.float32)
    return mx.concatenate([before, _triangle(count)], axis=1)


@cache
def _triangle(count: int) -> mx.array:
    made = mx.array(np.triu(np.full((count, count), -np.inf, np.float32), 1))
    mx.eval(made)  # a lazy array belongs to the thread that made it
    return made


def _shifts(mask: mx.array, groups: int) -> mx.array:
    """A mask of any kind as what is added, in powers of two: (R, G, N, S, K) or less."""
    if mask.dtype == mx.bool_:
        added = mx.where(mask, 0.0, -mx.inf)
    else:
        added = mask.astype(mx.float32) * LOG2_E
    if added.ndim < 3:
        return added
    if added.shape[-3] == 1:  # the same for all heads
        return mx.expand_dims(added, -3)
    return added.reshape(*added.shape[:-3], groups, -1, *added.shape[-2:])


def silu_mul(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up by a power of two, of whatever shape."""
    return gate / (1.0 + power_of_two(gate * -LOG2_E)) * up
