"""Compressing a row's tokens into entries of its cache: gated pooling per channel, norm, rotation
and store, of the steps' rows with what their open windows need kept in slots (DeepSeek-V4)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...platforms.interface_kernels import Case, Op, Tolerance
from .compressed_pages import PagedRows, entry_slots
from .contract import F32, I32, around_one, normal
from .interleaved_rope import interleaved_rope
from .norm import rms_norm
from .state_rows import each

TOLERANCE = {
    "float32": Tolerance(1e-5, 1e-5),
    "bfloat16": Tolerance(1e-2, 1e-2),
    "float16": Tolerance(2e-3, 2e-3),
}
"""All arithmetic and the state are float32 whatever the dtype: only what is stored is rounded."""

FLOAT32 = frozenset({"state", "ape", "weight", "cos", "sin"})


def compress_norm_rope_store(
    projected: F32,
    state: F32,
    slots: I32,
    ape: F32,
    weight: F32,
    eps: float,
    cos: F32,
    sin: F32,
    cache: F32,
    page_table: I32,
    query_start: I32,
    context_lens: I32,
    page_size: int,
) -> tuple[F32, F32]:
    """projected (T, 2 * C * D): keys (C * D) beside gate scores (C * D) of each token; state (S,
    ring, 2 * C * D) float32; slots, query_start, context_lens as in `state_rows`; ape (r, C * D)
    float32; weight (D,) float32; cos, sin (T, R/2) float32, the angles of position
    p // r * r for a token at position p; cache (pages * entries per page, D) and page_table (R, P)
    as in `compressed_pages` -> state and cache, both changed in place.

    D is the width of an entry, r the ratio, ring >= C * r. The projection of position p of a row,
    as it is, belongs in its slot at place p % ring: after the op the ring holds that of the last
    min(ring, context + new) tokens. Each entry that the step's tokens complete is made of C * r of
    them: with C = 1 of its own r; with C = 2 of the r before by the first D columns of keys, scores
    and ape, and of its own r by the last D. Places before the row's first token count nothing.
    entry = sum of softmax(score + ape[p % r]) * key, channel by channel; then `rms_norm`, then
    `interleaved_rope` with the angles of the token that completes it.
    """
    state, cache = state.copy(), cache.copy()
    ratio, ring = len(ape), state.shape[1]
    for row, tokens, slot, fresh in each(slots, query_start, context_lens):
        context = 0 if fresh else int(context_lens[row])
        kept = {p: state[slot, p % ring].copy() for p in range(max(0, context - ring), context)}
        for token in range(tokens.start, tokens.stop):
            position = int(context_lens[row]) + token - tokens.start
            kept[position] = projected[token]
            state[slot, position % ring] = projected[token]
            if (position + 1) % ratio == 0:
                pooled = _pool(kept, position, ape, len(weight))
                normed = rms_norm(pooled[None], weight, eps)[:, None]
                turned = interleaved_rope(normed, cos[token][None], sin[token][None])
                entry = np.array([position // ratio])
                where = entry_slots(page_table[row], entry, ratio, page_size)
                cache[where] = turned[:, 0]
    return state, cache


def _pool(kept: Mapping[int, F32], last: int, ape: F32, dim: int) -> F32:
    ratio, width = ape.shape
    parts = width // dim
    keys, scores = [], []
    for place in range(parts * ratio):
        position = last - parts * ratio + 1 + place
        if position >= 0:
            first = place // ratio * dim
            columns = slice(first, first + dim)
            key, score = kept[position][:width], kept[position][width:]
            keys.append(key[columns].astype(np.float64))
            scores.append(score[columns].astype(np.float64) + ape[position % ratio, columns])
    raised = np.exp(np.array(scores) - np.max(scores, axis=0))
    pooled = (raised / raised.sum(axis=0) * np.array(keys)).sum(axis=0)
    return pooled.astype(np.float32)


@dataclass(frozen=True, slots=True)
class _Form:
    """What a case has beside its rows; `padding` rows have no slot."""

    ratio: int
    parts: int
    dim: int = 12
    rotary: int = 4
    ring: int = 0  # 0: as many as are needed
    padding: tuple[int, ...] = ()


OVERLAP, PLAIN = _Form(4, 2), _Form(8, 1)

CASES = [
    (PagedRows("first_token", ((0, 1),)), OVERLAP),
    (PagedRows("first_entry", ((3, 1),)), OVERLAP),
    (PagedRows("decode", ((7, 1), (8, 1), (3, 1), (30, 1), (0, 1))), OVERLAP),
    (PagedRows("decode_plain", ((7, 1), (8, 1), (15, 1), (30, 1), (0, 1))), PLAIN),
    (PagedRows("decode_page_1", ((7, 1), (8, 1), (3, 1)), 1), OVERLAP),
    (PagedRows("decode_page_128", ((127, 1), (131, 1)), 128), OVERLAP),
    (PagedRows("prefill", ((0, 37),)), OVERLAP),
    (PagedRows("prefill_plain", ((0, 37),)), PLAIN),
    (PagedRows("chunks", ((5, 3), (6, 9), (1, 2), (12, 20), (8, 8))), OVERLAP),
    (PagedRows("chunks_plain", ((5, 3), (6, 9), (1, 2), (12, 20), (8, 8))), PLAIN),
    (PagedRows("mixed", ((19, 1), (0, 18), (7, 1), (23, 9), (0, 2))), OVERLAP),
    (PagedRows("pages_of_6", ((19, 1), (0, 18), (7, 1), (23, 9)), 6), OVERLAP),
    (PagedRows("pages_smaller_than_the_ratio", ((14, 3), (0, 34)), 4), PLAIN),
    (PagedRows("padding", ((3, 1), (7, 1), (0, 1))), _Form(4, 2, padding=(1, 2))),
    (PagedRows("mixed_padding", ((3, 5), (0, 8), (7, 1))), _Form(4, 2, padding=(1,))),
    (PagedRows("longer_ring", ((19, 1), (0, 18), (5, 7))), _Form(4, 2, ring=11)),
    (PagedRows("all_turned", ((6, 11),)), _Form(4, 2, 8, 8)),
    (PagedRows("odd_width", ((6, 11),)), _Form(3, 2, 11, 2)),
    (PagedRows("ratio_128", ((100, 200), (255, 1)), 128), _Form(128, 1, 6, 2)),
    (PagedRows("published_width", ((6, 3),)), _Form(4, 2, 512, 64)),
    (PagedRows("no_rows", ()), OVERLAP),
]


def cases(rng: np.random.Generator) -> Iterable[Case]:
    for rows, form in CASES:
        yield _build(rng, rows, form)
    far = _build(rng, PagedRows("far_scores", ((5, 9),)), OVERLAP)
    projected = far.args["projected"].copy()
    projected[:, projected.shape[1] // 2 :] *= np.float32(100)
    yield Case(far.name, {**far.args, "projected": projected})


def _build(rng: np.random.Generator, rows: PagedRows, form: _Form) -> Case:
    width, ring = form.parts * form.dim, form.ring or form.parts * form.ratio
    slots = rng.permutation(len(rows.rows) + 2)[: len(rows.rows)].astype(np.int32)
    state = np.full((len(slots) + 2, ring, 2 * width), np.nan, np.float32)
    for slot, (context, _) in zip(slots, rows.rows, strict=True):
        for position in range(max(0, context - ring), context):
            state[slot, position % ring] = rng.standard_normal(2 * width)
    slots[list(form.padding)] = -1
    table, where = rows.table(rng), rows.where()
    positions = [np.arange(context, context + new) for context, new in rows.rows]
    first = np.concatenate([*positions, np.zeros(0, np.int64)]) // form.ratio * form.ratio
    rates = 1000.0 ** (-np.arange(form.rotary // 2) / (form.rotary // 2))
    angles = first[:, None] * rates
    return Case(
        rows.name,
        {
            "projected": normal(rng, rows.tokens, 2 * width),
            "state": state,
            "slots": slots,
            "ape": normal(rng, form.ratio, width),
            "weight": around_one(rng, form.dim),
            "eps": 1e-6,
            "cos": np.cos(angles).astype(np.float32),
            "sin": np.sin(angles).astype(np.float32),
            "cache": rows.entries(rng, table, form.ratio, form.dim, "before"),
            "page_table": table,
            **where,
            "page_size": rows.page_size,
        },
    )


def dims(args: Mapping[str, Any]) -> dict[str, int]:
    """Static sizes of a call site."""
    ratio, width = args["ape"].shape
    dim = len(args["weight"])
    sizes = {"ring": args["state"].shape[1], "page_size": args["page_size"]}
    return {"ratio": ratio, "dim": dim, "parts": width // dim, **sizes}


OPS = (
    Op(
        "compress_norm_rope_store",
        compress_norm_rope_store,
        cases,
        TOLERANCE,
        parts=("rms_norm", "interleaved_rope"),
        float32=FLOAT32,
        in_place=frozenset({"state", "cache"}),
        dims=dims,
    ),
)
