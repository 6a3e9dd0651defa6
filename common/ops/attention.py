"""Causal attention of a step's rows over paged keys and values, prefill and decode alike.

Attention backends (plan, bind, run) are tested against this reference; there is no kernel table
entry, because the three phases do not fit one call.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...platforms.interface_kernels import Case, Op, Tolerance
from .contract import F32, I32, I64, normal
from .paging import from_int8_rows, kv_write, to_int8_rows

TOLERANCE = {
    "float32": Tolerance(1e-5, 1e-5),
    "bfloat16": Tolerance(3e-2, 3e-2),
    "float16": Tolerance(5e-3, 5e-3),
}


def attention(
    q: F32,
    k: F32,
    v: F32,
    keys: F32,
    values: F32,
    page_table: I32,
    query_start: I32,
    context_lens: I32,
    page_size: int,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    sinks: F32 | None = None,
    tree_mask: NDArray[np.bool_] | None = None,
) -> F32:
    """q (T, Hq, D), k and v (T, Hk, D) of the new tokens; keys, values (S, Hk, D) by slot;
    page_table (R, P), query_start (R+1,), context_lens (R,) as in StepBatch -> (T, Hq, D).

    All new keys and values are written first. The query at position p of its row then sees
    positions max(0, p-window+1) .. p (from 0 when window is 0). Query head h reads kv head
    h // (Hq / Hk). With a soft cap c, scaled logits s become c * tanh(s / c). `sinks` (Hq,) are
    logits that join each head's softmax, neither scaled nor capped, and take no value (gpt-oss;
    Xiao et al. 2023). With `tree_mask` (T, W), the query of token t sees, of its row's new tokens,
    only those j with tree_mask[t, j], j counting from the row's first. Slots that no query of the
    step sees may hold anything, NaN included.
    """
    slots = flat_slots(page_table, query_start, context_lens, page_size)
    keys, values = kv_write(keys, values, slots, k, v)
    result = np.zeros(q.shape, np.float64)
    group = q.shape[1] // keys.shape[1]
    for row in range(len(context_lens)):
        for token in range(query_start[row], query_start[row + 1]):
            position = int(context_lens[row] + token - query_start[row])
            first = max(0, position - window + 1) if window else 0
            seen = np.arange(first, position + 1)
            if tree_mask is not None:
                new = seen - context_lens[row]
                seen = seen[(new < 0) | tree_mask[token, np.maximum(new, 0)]]
            seen_slots = page_table[row, seen // page_size] * page_size + seen % page_size
            for head in range(q.shape[1]):
                past = keys[seen_slots, head // group].astype(np.float64)
                logits = past @ q[token, head] * scale
                if soft_cap:
                    logits = soft_cap * np.tanh(logits / soft_cap)
                sink = -np.inf if sinks is None else float(sinks[head])
                peak = max(logits.max(), sink)
                weights = np.exp(logits - peak)
                weights /= weights.sum() + np.exp(sink - peak)
                result[token, head] = weights @ values[seen_slots, head // group]
    return result.astype(np.float32)


def int8_attention(**args: Any) -> F32:
    """`attention` where the cache rounds keys and values to eight bits (`to_int8_rows`)."""
    kept = {name: from_int8_rows(to_int8_rows(args[name])) for name in ("keys", "values", "k", "v")}
    return attention(**{**args, **kept})


def flat_slots(page_table: I32, query_start: I32, context_lens: I32, page_size: int) -> I64:
    """(T,) slot (page * page_size + offset) of every new token of a step."""
    lengths = query_start[1:] - query_start[:-1]
    row_of_token = np.arange(len(lengths)).repeat(lengths)
    positions = np.arange(len(row_of_token)) + (context_lens - query_start[:-1]).repeat(lengths)
    pages = page_table[row_of_token, positions // page_size].astype(np.int64)
    return np.asarray(pages * page_size + positions % page_size, np.int64)


@dataclass(frozen=True, slots=True)
class Shape:
    name: str
    rows: tuple[tuple[int, int], ...]  # (context, new tokens)
    page_size: int
    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    window: int = 0
    soft_cap: float = 0.0
    sinks: tuple[float, ...] = ()  # one per head; () = none


def build(rng: np.random.Generator, shape: Shape) -> Case:
    size = shape.page_size
    counts = [-(-(context + new) // size) for context, new in shape.rows]
    order = rng.permutation(np.arange(1, sum(counts) + 3))  # two pages belong to nobody
    table = np.zeros((len(counts), max(counts) + 1), np.int32)
    slots = (len(order) + 1) * size
    keys = np.full((slots, shape.kv_heads, shape.dim), np.nan, np.float32)
    values = keys.copy()
    for row, (context, _) in enumerate(shape.rows):
        pages = order[sum(counts[:row]) : sum(counts[: row + 1])]
        table[row, : len(pages)] = pages
        begun = -(-context // size)  # pages an earlier step began: no NaN there, stale or not
        first_seen = max(0, context + 1 - shape.window) // size if shape.window else 0
        table[row, :first_seen] = 0  # released by the window
        for page in table[row, first_seen:begun]:
            where = slice(page * size, (page + 1) * size)
            keys[where] = normal(rng, size, shape.kv_heads, shape.dim)
            values[where] = normal(rng, size, shape.kv_heads, shape.dim)
    new = np.array([n for _, n in shape.rows])
    tokens = int(new.sum())
    return Case(
        shape.name,
        {
            "q": normal(rng, tokens, shape.heads, shape.dim, scale=2.0),
            "k": normal(rng, tokens, shape.kv_heads, shape.dim),
            "v": normal(rng, tokens, shape.kv_heads, shape.dim),
            "keys": keys,
            "values": values,
            "page_table": table,
            "query_start": np.concatenate(([0], np.cumsum(new))).astype(np.int32),
            "context_lens": np.array([c for c, _ in shape.rows], np.int32),
            "page_size": size,
            "scale": shape.dim**-0.5,
            "window": shape.window,
            "soft_cap": shape.soft_cap,
            "sinks": np.array(shape.sinks, np.float32) if shape.sinks else None,
            "tree_mask": None,
        },
    )


SINKS = (1.5, -0.5, 4.0, 0.0)

SHAPES = (
    Shape("first_token", ((0, 1),), 16),
    Shape("decode_one", ((37, 1),), 16),
    Shape("decode_page_boundary", ((16, 1), (15, 1), (17, 1)), 16),
    Shape("decode_unlike_lengths", ((1, 1), (300, 1), (31, 1), (299, 1), (0, 1)), 16),
    Shape("decode_page_1", ((5, 1), (9, 1)), 1),
    Shape("decode_page_128", ((5, 1), (130, 1), (127, 1)), 128),
    Shape("prefill", ((0, 21),), 16),
    Shape("prefill_two", ((0, 5), (0, 33)), 16),
    Shape("prefill_page_1", ((0, 7), (3, 4)), 1),
    Shape("prefill_page_128", ((0, 140), (60, 7)), 128),
    Shape("chunk_after_context", ((19, 14),), 16),
    Shape("mixed", ((50, 1), (0, 18), (7, 1), (23, 9), (80, 1)), 16),
    Shape("mixed_mqa_128", ((20, 1), (0, 6), (3, 5)), 16, heads=6, kv_heads=1, dim=128),
    Shape("mha_80", ((20, 1), (0, 6)), 16, heads=3, kv_heads=3, dim=80),
    Shape("gqa_64", ((20, 1), (21, 1), (4, 6)), 16, heads=9, kv_heads=3, dim=64),
    Shape("dim_200", ((20, 1), (0, 6)), 16, heads=4, kv_heads=2, dim=200),
    Shape("dim_256", ((20, 1), (0, 6)), 16, heads=4, kv_heads=1, dim=256),
    Shape("window_decode", ((50, 1), (3, 1), (200, 1)), 16, window=20),
    Shape("window_below_page", ((50, 1), (3, 1), (15, 1)), 16, window=5),
    Shape("window_1", ((33, 1), (0, 4)), 16, window=1),
    Shape("window_prefill", ((0, 40), (0, 3)), 16, window=9),
    Shape("window_chunk", ((45, 30), (5, 11), (90, 1)), 16, window=24),
    Shape("window_page_1", ((30, 1), (12, 8)), 1, window=7),
    Shape("window_page_128", ((300, 1), (130, 20)), 128, window=64),
    Shape("soft_cap", ((20, 1), (0, 9), (6, 5)), 16, soft_cap=2.0),
    Shape("soft_cap_window", ((40, 1), (30, 9)), 16, soft_cap=2.0, window=8),
    Shape("sinks", ((50, 1), (0, 18), (7, 1), (400, 1)), 16, sinks=SINKS),
    Shape("sinks_first_token", ((0, 1),), 16, sinks=SINKS),
    Shape("sinks_window", ((50, 1), (45, 30), (0, 7)), 16, sinks=SINKS, window=9),
    Shape("sinks_soft_cap", ((20, 1), (6, 5)), 16, sinks=SINKS, soft_cap=2.0),
    Shape("sinks_soft_cap_window", ((300, 1), (30, 9)), 16, sinks=SINKS, soft_cap=2.0, window=200),
    Shape("sinks_gqa_64", ((20, 1), (300, 1), (4, 6)), 16, 8, 1, dim=64, sinks=2 * SINKS),
    Shape("sinks_far_above", ((20, 1), (300, 1), (4, 6)), 16, sinks=(200.0, 60.0, 1e4, 30.0)),
    Shape("sinks_far_below", ((20, 1), (300, 1), (4, 6)), 16, sinks=(-200.0, -60.0, -1e4, -30.0)),
)


def cases(rng: np.random.Generator) -> Iterable[Case]:
    """dim_200: a report of heads that no power of two divides (flash-attention-npu 135); windows
    behind longer prompts: of a window that was not kept (intel/torch-xpu-ops 4428)."""
    for shape in SHAPES:
        yield build(rng, shape)
    yield _shared_page(rng)


def _shared_page(rng: np.random.Generator) -> Case:
    """Row 1 reads a page that row 0 writes in the same step."""
    case = build(rng, Shape("page_written_by_a_neighbour", ((0, 16), (16, 5)), 16))
    table = case.args["page_table"].copy()
    table[1, 0] = table[0, 0]
    return Case(case.name, {**case.args, "page_table": table})


TREES = (
    Shape("drafts_after_context", ((37, 6),), 16),
    Shape("drafts_of_first_tokens", ((0, 5), (0, 9)), 16),
    Shape("drafts_of_unlike_rows", ((50, 1), (16, 4), (7, 8), (299, 2)), 16),
    Shape("drafts_page_1", ((5, 4), (9, 3)), 1),
    Shape("drafts_page_128", ((130, 7), (125, 6)), 128),
    Shape("drafts_with_sinks", ((20, 5), (6, 1)), 16, sinks=SINKS),
    Shape("drafts_with_soft_cap", ((20, 5), (6, 3)), 16, soft_cap=2.0),
)


def tree_cases(rng: np.random.Generator) -> Iterable[Case]:
    """Random trees: every new token but the first of a row hangs on an earlier one of the row."""
    for shape in TREES:
        case = build(rng, shape)
        yield Case(case.name, {**case.args, "tree_mask": random_trees(rng, shape)})
    chain = build(rng, Shape("a_chain_is_causal", ((20, 6), (0, 4)), 16))
    mask = np.concatenate([np.tri(6, dtype=bool), np.tri(4, 6, dtype=bool)])
    yield Case(chain.name, {**chain.args, "tree_mask": mask})
    alone = build(rng, Shape("siblings", ((20, 6),), 16))
    yield Case(alone.name, {**alone.args, "tree_mask": np.eye(6, dtype=bool)})


def random_trees(rng: np.random.Generator, shape: Shape) -> NDArray[np.bool_]:
    """(T, W): each token sees its ancestors and itself."""
    widest = max(new for _, new in shape.rows)
    rows = []
    for _, new in shape.rows:
        tree = np.zeros((new, widest), bool)
        for token in range(new):
            tree[token] = tree[rng.integers(0, token)] if token else False
            tree[token, token] = True
        rows.append(tree)
    return np.concatenate(rows)


OPS = (
    Op("attention", attention, cases, TOLERANCE, float32=frozenset({"sinks"})),
    Op("tree_attention", attention, tree_cases, TOLERANCE, float32=frozenset({"sinks"})),
    Op(
        "attention",
        int8_attention,
        cases,
        TOLERANCE,
        float32=frozenset({"sinks"}),
        kv_dtype="int8",
    ),
)
"""Of attention backends, which refuse those whose tree masks or kept dtype they do not have."""
