"""Which compressed entries a query attends to: the best of a small model of attention with keys of
its own (the "lightning indexer" of DeepSeek-V3.2 and V4)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ...platforms.interface_kernels import Case, Op
from .compressed_pages import PagedRows, entry_slots
from .contract import EXACT, F32, I32, I64


def index_topk(
    q: F32,
    weights: F32,
    cache: F32,
    page_table: I32,
    query_start: I32,
    context_lens: I32,
    page_size: int,
    ratio: int,
    top_k: int,
) -> I64:
    """q (T, H, D), weights (T, H); cache (pages * entries per page, D) of entries' keys, and
    page_table (R, P), as in `compressed_pages`; query_start, context_lens as in StepBatch
    -> (T, top_k) int: entries of the query's row, ascending, then -1 where there are no more.

    The query at position p sees entries below (p + 1) // ratio. Of these it takes the top_k with
    the largest sum over heads of weights[h] * max(0, q[h] . key), the lowest entry among equals.
    Sums in float32. Slots that no query sees may hold anything, NaN included.
    """
    result = np.full((len(q), top_k), -1, np.int64)
    for row, context in enumerate(context_lens):
        for token in range(query_start[row], query_start[row + 1]):
            seen = np.arange((context + token - query_start[row] + 1) // ratio)
            keys = cache[entry_slots(page_table[row], seen, ratio, page_size)].astype(np.float64)
            heads = np.maximum(q[token].astype(np.float64) @ keys.T, 0.0)
            scores = weights[token].astype(np.float64) @ heads
            best = np.argsort(-scores, kind="stable")[:top_k]
            result[token, : len(best)] = np.sort(best)
    return result


CASES = [
    (PagedRows("nothing_to_see", ((0, 1), (1, 1))), 4, 3, (2, 8)),
    (PagedRows("fewer_than_wanted", ((11, 1), (3, 1), (0, 5))), 4, 6, (2, 8)),
    (PagedRows("decode", ((70, 1), (31, 1), (0, 1), (99, 1))), 4, 5, (4, 8)),
    (PagedRows("decode_page_1", ((33, 1), (20, 1)), 1), 4, 3, (4, 8)),
    (PagedRows("decode_page_128", ((140, 1), (200, 1)), 128), 4, 7, (4, 8)),
    (PagedRows("prefill", ((0, 90),)), 4, 5, (4, 8)),
    (PagedRows("mixed", ((50, 1), (0, 41), (7, 1), (23, 9))), 4, 4, (3, 5)),
    (PagedRows("pages_of_6", ((50, 1), (0, 41), (23, 9)), 6), 4, 4, (3, 5)),
    (PagedRows("one_head", ((50, 3), (17, 1))), 2, 4, (1, 3)),
    (PagedRows("published", ((300, 2), (80, 1)), 64), 4, 32, (64, 128)),
    (PagedRows("no_rows", ()), 4, 4, (2, 8)),
]


def cases(rng: np.random.Generator) -> Iterable[Case]:
    """Small whole numbers: every sum is exact in every dtype, and equal scores are many."""
    for rows, ratio, top_k, sizes in CASES:
        yield _build(rng, rows, ratio, top_k, sizes)
    case = _build(rng, PagedRows("all_equal", ((60, 1), (20, 9))), 4, 5, (2, 4))
    yield Case(case.name, {**case.args, "q": np.zeros_like(case.args["q"])})


def _build(
    rng: np.random.Generator, rows: PagedRows, ratio: int, top_k: int, sizes: tuple[int, int]
) -> Case:
    (heads, dim), table = sizes, rows.table(rng)
    cache = rows.entries(rng, table, ratio, dim, "behind")
    return Case(
        rows.name,
        {
            "q": rng.integers(-2, 3, (rows.tokens, heads, dim)).astype(np.float32),
            "weights": rng.integers(-2, 5, (rows.tokens, heads)).astype(np.float32) / 2,
            "cache": np.rint(cache),
            "page_table": table,
            **rows.where(),
            "page_size": rows.page_size,
            "ratio": ratio,
            "top_k": top_k,
        },
    )


def dims(args: Mapping[str, Any]) -> dict[str, int]:
    """Static sizes of a call site."""
    _, heads, dim = args["q"].shape
    return {"heads": heads, "dim": dim, **{k: args[k] for k in ("page_size", "ratio", "top_k")}}


OPS = (Op("index_topk", index_topk, cases, EXACT, dims=dims),)
