"""Attention of one new token per row over pages read in place (decode), with sinks.

Storage is head by head as in `page_gather`. Unlike `attention`, the new keys and values are in the
pages already.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ...platforms.interface_kernels import Case, Op
from .attention import TOLERANCE
from .contract import F32, I32, normal


def paged_attention(
    q: F32,
    keys: F32,
    values: F32,
    pages: I32,
    lengths: I32,
    kv_heads: int,
    page_size: int,
    scale: float,
    window: int = 0,
    sinks: F32 | None = None,
) -> F32:
    """q (R, Hq, Dk); keys (kv_heads * S, Dk), values (kv_heads * S, Dv) storage; pages (R, P) int,
    in order of position; lengths (R,) int, tokens of each row with its newest -> (R, Hq, Dv).

    The query stands at position length - 1 and sees positions max(0, length - window) .. (from 0
    when window is 0). Query head h reads kv head h // (Hq / kv_heads). sinks (Hq,): one more logit
    per head, of a key whose value is zero. A row of length 0 gives zeros. Slots that no row sees
    may hold anything, NaN included.
    """
    by_slot = keys.reshape(kv_heads, -1, keys.shape[1])
    values_by_slot = values.reshape(kv_heads, -1, values.shape[1])
    result = np.zeros((*q.shape[:2], values.shape[1]), np.float64)
    group = q.shape[1] // kv_heads
    for row, length in enumerate(lengths):
        seen = np.arange(max(0, length - window) if window else 0, length)
        slots = pages[row, seen // page_size] * page_size + seen % page_size
        for head in range(q.shape[1] if len(seen) else 0):
            past = by_slot[head // group, slots].astype(np.float64)
            logits = past @ q[row, head].astype(np.float64) * scale
            best = max(logits.max(), -np.inf if sinks is None else sinks[head])
            weights = np.exp(logits - best)
            total = weights.sum() + (0.0 if sinks is None else np.exp(float(sinks[head]) - best))
            result[row, head] = weights @ values_by_slot[head // group, slots] / total
    return result.astype(np.float32)


@dataclass(frozen=True, slots=True)
class _Shape:
    name: str
    lengths: tuple[int, ...]
    page_size: int = 16
    heads: int = 4
    kv_heads: int = 2
    dims: tuple[int, int] = (64, 64)
    window: int = 0
    sinks: float | None = None  # size of the sinks' logits


SHAPES = (
    _Shape("one_row", (37,)),
    _Shape("one_token", (1,)),
    _Shape("page_boundary", (16, 15, 17)),
    _Shape("unlike_lengths", (1, 300, 31, 299)),
    _Shape("a_row_of_nothing", (0, 5)),
    _Shape("no_rows", ()),
    _Shape("page_size_1", (5, 9), page_size=1),
    _Shape("page_size_128", (5, 130, 127), page_size=128),
    _Shape("one_kv_head_128", (20, 3), heads=6, kv_heads=1, dims=(128, 128)),
    _Shape("no_groups_80", (20, 7), heads=3, kv_heads=3, dims=(80, 80)),
    _Shape("groups_of_3", (20, 21), heads=9, kv_heads=3),
    _Shape("dim_256", (20, 40), heads=4, kv_heads=1, dims=(256, 256)),
    _Shape("unlike_widths", (20, 40), dims=(192, 128)),
    _Shape("window", (50, 3, 200), window=20),
    _Shape("window_below_page", (50, 3, 16), window=5),
    _Shape("window_1", (33, 1), window=1),
    _Shape("sinks", (20, 1, 33), sinks=1.0),
    _Shape("sinks_far_above", (20, 7), sinks=1e4),
    _Shape("sinks_far_below", (20, 7), sinks=-1e4),
    _Shape("sinks_and_window", (50, 4), window=8, sinks=2.0),
)


def cases(rng: np.random.Generator) -> Iterable[Case]:
    for shape in SHAPES:
        yield _build(rng, shape)


def _build(rng: np.random.Generator, shape: _Shape) -> Case:
    size, lengths = shape.page_size, np.array(shape.lengths, np.int32)
    counts = -(-lengths // size)
    order = rng.permutation(np.arange(1, counts.sum() + 3))  # two pages belong to nobody
    table = np.zeros((len(lengths), int(counts.max(initial=0)) + 1), np.int32)
    storage = [
        np.full((shape.kv_heads, (len(order) + 1) * size, dim), np.nan, np.float32)
        for dim in shape.dims
    ]
    for row, length in enumerate(lengths):
        begin = counts[:row].sum()
        table[row, : counts[row]] = order[begin : begin + counts[row]]
        seen = np.arange(max(0, length - shape.window) if shape.window else 0, length)
        slots = table[row, seen // size] * size + seen % size
        for part, dim in zip(storage, shape.dims, strict=True):
            part[:, slots] = normal(rng, shape.kv_heads, len(slots), dim)
    sign = rng.uniform(0.5, 1.0, shape.heads)
    sinks = None if shape.sinks is None else (shape.sinks * sign).astype(np.float32)
    return Case(
        shape.name,
        {
            "q": normal(rng, len(lengths), shape.heads, shape.dims[0], scale=2.0),
            "keys": storage[0].reshape(-1, shape.dims[0]),
            "values": storage[1].reshape(-1, shape.dims[1]),
            "pages": table,
            "lengths": lengths,
            "kv_heads": shape.kv_heads,
            "page_size": size,
            "scale": shape.dims[0] ** -0.5,
            "window": shape.window,
            "sinks": sinks,
        },
    )


OPS = (Op("paged_attention", paged_attention, cases, TOLERANCE),)
