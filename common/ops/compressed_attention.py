"""Attention over a window of tokens and compressed entries of all before, one vector being key and
value of all heads (DeepSeek-V4: with all entries where they are few, with selected ones else)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...platforms.interface_kernels import Case, Op
from .attention import TOLERANCE, flat_slots
from .compressed_pages import PagedRows, entry_slots
from .contract import F32, I32, I64, normal


def compressed_attention(
    q: F32,
    kv: F32,
    sinks: F32,
    window_cache: F32,
    window_table: I32,
    query_start: I32,
    context_lens: I32,
    page_size: int,
    window: int,
    scale: float,
    entries: F32 | None = None,
    entry_table: I32 | None = None,
    ratio: int = 0,
    selected: I64 | None = None,
) -> tuple[F32, F32]:
    """q (T, H, D), kv (T, D) of the new tokens, sinks (H,) float32; window_cache (S, D) by slot =
    page * page_size + offset with window_table (R, P); query_start, context_lens as in StepBatch;
    entries (pages * entries per page, D) with entry_table (R, P) as in `compressed_pages`, or None
    -> (T, H, D) and the window cache, changed in place.

    All new kv are written first. The query at position p of its row then sees tokens
    max(0, p - window + 1) .. p and, if there are entries, those below (p + 1) // ratio; with
    `selected` (T, k) int only those of them that it names, -1 naming none. Softmax over
    scale * q . kv and the head's sink, which takes no value; what is seen is also what is summed.
    A token seen in both forms counts twice. Slots that no query of the step sees may hold anything,
    NaN included.
    """
    window_cache = window_cache.copy()
    window_cache[flat_slots(window_table, query_start, context_lens, page_size)] = kv
    result = np.zeros(q.shape, np.float64)
    for row, context in enumerate(context_lens):
        for token in range(query_start[row], query_start[row + 1]):
            position = int(context + token - query_start[row])
            seen = np.arange(max(0, position - window + 1), position + 1)
            slots = window_table[row, seen // page_size] * page_size + seen % page_size
            past = window_cache[slots].astype(np.float64)
            if entries is not None and entry_table is not None:
                chosen = np.arange((position + 1) // ratio)
                if selected is not None:
                    chosen = chosen[np.isin(chosen, selected[token])]
                where = entry_slots(entry_table[row], chosen, ratio, page_size)
                past = np.concatenate([past, entries[where]])
            logits = q[token].astype(np.float64) @ past.T * scale
            peak = np.maximum(logits.max(axis=-1), sinks)[:, None]
            raised = np.exp(logits - peak)
            total = raised.sum(axis=-1, keepdims=True) + np.exp(sinks[:, None] - peak)
            result[token] = raised / total @ past
    return result.astype(np.float32), window_cache


@dataclass(frozen=True, slots=True)
class _Form:
    """`ratio` 0: no entries; `top_k` 0: all of them."""

    ratio: int = 4
    top_k: int = 0
    window: int = 8
    heads: int = 4
    dim: int = 16


MIXED = ((50, 1), (0, 18), (7, 1), (23, 9))
CASES = [
    (PagedRows("first_token", ((0, 1),)), _Form()),
    (PagedRows("window_only", MIXED), _Form(0)),
    (PagedRows("decode_window_only", ((50, 1), (3, 1))), _Form(0)),
    (PagedRows("decode_all", ((50, 1), (15, 1), (7, 1), (0, 1))), _Form(16)),
    (PagedRows("decode_selected", ((50, 1), (15, 1), (7, 1), (0, 1))), _Form(4, 3)),
    (PagedRows("decode_page_1", ((50, 1), (19, 1)), 1), _Form(4, 3)),
    (PagedRows("decode_page_128", ((150, 1), (127, 1)), 128), _Form(4, 5)),
    (PagedRows("prefill_all", ((0, 45),)), _Form(16)),
    (PagedRows("prefill_selected", ((0, 45),)), _Form(4, 3)),
    (PagedRows("mixed_all", MIXED), _Form(4)),
    (PagedRows("mixed_selected", MIXED), _Form(4, 2)),
    (PagedRows("pages_of_6", MIXED, 6), _Form(4, 2)),
    (PagedRows("chunk_page_128", ((0, 140), (60, 7)), 128), _Form(16)),
    (PagedRows("longer_than_a_block", ((3, 150),)), _Form(4, 12)),
    (PagedRows("few_of_many", ((90, 40), (3, 1))), _Form(2, 3)),
    (PagedRows("window_beyond_the_row", ((5, 3), (0, 2))), _Form(4, 2, window=64)),
    (PagedRows("window_of_one", MIXED), _Form(4, 0, window=1)),
    (PagedRows("one_head_odd_width", MIXED), _Form(3, 2, 5, 1, 13)),
    (PagedRows("published", ((200, 1), (130, 2))), _Form(4, 8, 128, 8, 512)),
    (PagedRows("no_rows", ()), _Form()),
]


def cases(rng: np.random.Generator) -> Iterable[Case]:
    for rows, form in CASES:
        yield _build(rng, rows, form)
    mixed = _build(rng, PagedRows("large_sinks", MIXED), _Form(4, 2))
    yield Case(mixed.name, {**mixed.args, "sinks": np.array([60, -60, 3, 0], np.float32)})
    nobody = {**mixed.args, "selected": np.full_like(mixed.args["selected"], -1)}
    yield Case("nothing_selected", nobody)


def _build(rng: np.random.Generator, rows: PagedRows, form: _Form) -> Case:
    size, dim, table = rows.page_size, form.dim, rows.table(rng)
    cache = np.full((rows.pages * size, dim), np.nan, np.float32)
    for row, (context, _) in enumerate(rows.rows):
        seen = np.arange(max(0, context - form.window + 1), context)
        cache[table[row, seen // size] * size + seen % size] = normal(rng, len(seen), dim)
        table[row, : max(0, context - form.window + 1) // size] = 0  # released
    args = {
        "q": normal(rng, rows.tokens, form.heads, dim),
        "kv": normal(rng, rows.tokens, dim),
        "sinks": normal(rng, form.heads),
        "window_cache": cache,
        "window_table": table,
        **rows.where(),
        "page_size": size,
        "window": form.window,
        "scale": dim**-0.5,
        "entries": None,
        "entry_table": None,
        "ratio": form.ratio,
        "selected": None,
    }
    if form.ratio:
        args["entry_table"] = rows.table(rng)
        args["entries"] = rows.entries(rng, args["entry_table"], form.ratio, dim, "behind")
    if form.top_k:
        args["selected"] = _selected(rng, rows, form)
    return Case(rows.name, args)


def _selected(rng: np.random.Generator, rows: PagedRows, form: _Form) -> I64:
    chosen = np.full((rows.tokens, form.top_k), -1, np.int64)
    token = 0
    for context, new in rows.rows:
        for position in range(context, context + new):
            some = rng.permutation((position + 1) // form.ratio)[: form.top_k]
            chosen[token, : len(some)] = np.sort(some)
            token += 1
    return chosen


def dims(args: Mapping[str, Any]) -> dict[str, int]:
    """Static sizes of a call site. `selected` is 0 where all entries are seen."""
    _, heads, dim = args["q"].shape
    count = 0 if args["selected"] is None else args["selected"].shape[1]
    sizes = {name: args[name] for name in ("page_size", "window", "ratio")}
    return {"heads": heads, "dim": dim, "selected": count, **sizes}


OPS = (
    Op(
        "compressed_attention",
        compressed_attention,
        cases,
        TOLERANCE,
        float32=frozenset({"sinks"}),
        in_place=frozenset({"window_cache"}),
        dims=dims,
    ),
)
