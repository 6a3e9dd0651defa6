"""Choosing the experts of every token, and their weights.

The four published forms, from one set of arguments: softmax (Shazeer et al. 2017; Mixtral, Qwen3,
gpt-oss), sigmoid with a bias that only steers the choice and grouped experts (DeepSeek-V3 report,
section 2.1.2), the square root of softplus, and experts named by the token's id (DeepSeek-V4).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...platforms.interface_kernels import Case, Op, Tolerance
from .contract import F32, I64, normal

SCORES = ("softmax", "sigmoid", "sqrt_softplus")
EPS = 1e-20
"""Added to the sum that weights are divided by."""

TOLERANCE = dict.fromkeys(("float32", "bfloat16", "float16"), Tolerance(2e-6, 1e-5))
"""Scores are computed in float32 from the router's float32 logits, whatever the model's dtype."""

F64 = NDArray[np.float64]


def moe_route(
    logits: F32,
    scores: str,
    top_k: int,
    renormalise: bool,
    scale: float = 1.0,
    bias: F32 | None = None,
    groups: int = 1,
    kept_groups: int = 1,
    table: I64 | None = None,
    token_ids: I64 | None = None,
) -> tuple[F32, I64]:
    """logits (T, E) float32 -> weights (T, top_k) float32 and experts (T, top_k) int.

    Each token's scores are softmax over all experts, sigmoid, or sqrt(softplus). What is chosen by
    is the score plus `bias` (E,) float32; the experts are the top_k largest, best first, the lowest
    id among equals. With `groups`, neighbouring experts form that many groups of at least two; only
    the kept_groups whose two best experts sum highest take part (lowest group among equals).
    With `table` (V, top_k) and token_ids (T,), the experts are table[token_ids], in that order.
    Weights are the scores of the chosen, without bias; divided by their sum + 1e-20 if
    `renormalise`; times `scale`.
    """
    every = _scores(logits.astype(np.float64), scores)
    if table is not None and token_ids is not None:
        chosen = np.asarray(table[token_ids], np.int64)
    else:
        choosing = every if bias is None else every + bias
        choosing = _within_groups(choosing, groups, kept_groups)
        chosen = np.argsort(-choosing, axis=-1, kind="stable")[:, :top_k]
    weights = np.take_along_axis(every, chosen, axis=-1)
    if renormalise:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + EPS)
    return (weights * scale).astype(np.float32), chosen


def _scores(logits: F64, scores: str) -> F64:
    if scores == "softmax":
        shifted = np.exp(logits - logits.max(axis=-1, keepdims=True, initial=-np.inf))
        return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))
    if scores == "sigmoid":
        return 1.0 / (1.0 + np.exp(-logits))
    if scores == "sqrt_softplus":
        return np.sqrt(np.maximum(logits, 0.0) + np.log1p(np.exp(-np.abs(logits))))
    raise ValueError(f"No scores {scores!r}; there are: {', '.join(SCORES)}.")


def _within_groups(choosing: F64, groups: int, kept: int) -> F64:
    if groups == 1:
        return choosing
    by_group = choosing.reshape(len(choosing), groups, -1)
    best = np.sort(by_group, axis=-1)[..., -2:].sum(axis=-1)
    order = np.argsort(-best, axis=-1, kind="stable")[:, :kept]
    allowed = np.zeros(best.shape, bool)
    np.put_along_axis(allowed, order, True, axis=-1)
    return np.where(allowed[..., None], by_group, -np.inf).reshape(choosing.shape)


def _case(rng: np.random.Generator, name: str, rows: int, experts: int, **rest: Any) -> Case:
    given: dict[str, Any] = {
        "logits": normal(rng, rows, experts, scale=2.0),
        "scores": "softmax",
        "top_k": 2,
        "renormalise": True,
        "scale": 1.0,
        "bias": None,
        "groups": 1,
        "kept_groups": 1,
        "table": None,
        "token_ids": None,
    }
    return Case(name, {**given, **rest})


def cases(rng: np.random.Generator) -> Iterable[Case]:
    for scores in SCORES:
        yield _case(rng, f"{scores}_one_row", 1, 8, scores=scores)
        yield _case(rng, f"{scores}_raw", 5, 7, scores=scores, top_k=3, renormalise=False)
        yield _case(rng, f"{scores}_all", 3, 5, scores=scores, top_k=5, scale=2.5)
    yield _case(rng, "no_rows", 0, 8)
    yield _case(rng, "one_expert", 3, 1, top_k=1)
    yield _case(rng, "many", 33, 257, top_k=8)
    tied = np.array([[1.0, 2.0, 2.0, 2.0, 0.0], [0.0] * 5, [3.0, 3.0, 1.0, 1.0, 3.0]], np.float32)
    for scores in SCORES:
        yield _case(rng, f"{scores}_ties_go_to_the_lowest_id", 3, 5, logits=tied, scores=scores)
    far = np.array([[-80.0, -90.0, -30.0, -85.0], [40.0, 0.0, -40.0, 1.0]], np.float32)
    for scores in SCORES:
        yield _case(rng, f"{scores}_far_below", 2, 4, logits=far, scores=scores)
    banned = np.array([[-np.inf, 1.0, 0.0, -np.inf], [2.0, -np.inf, 1.0, 0.5]], np.float32)
    yield _case(rng, "softmax_of_minus_infinity", 2, 4, logits=banned)
    yield from _steered_cases(rng)
    table = rng.integers(0, 9, (50, 3), dtype=np.int64)
    ids = np.array([49, 0, 7, 7], np.int64)
    by_table = {"table": table, "token_ids": ids, "top_k": 3, "scale": 1.5}
    yield _case(rng, "by_token_id", 4, 9, scores="sqrt_softplus", **by_table)


def _steered_cases(rng: np.random.Generator) -> Iterable[Case]:
    for scores in ("sigmoid", "sqrt_softplus"):
        bias = normal(rng, 16, scale=0.7)
        yield _case(rng, f"{scores}_bias", 9, 16, scores=scores, bias=bias, top_k=4, scale=2.5)
    # Biased scores below zero: what a group that is left out must still lie below.
    for name, shift, kept in [("groups", 0.0, 2), ("groups_below_zero", -3.0, 1)]:
        bias = normal(rng, 24, scale=0.5) + np.float32(shift)
        rest = {"bias": bias, "groups": 4, "kept_groups": kept, "top_k": 5}
        yield _case(rng, name, 11, 24, scores="sigmoid", **rest)
    alone = np.full((1, 8), -4.0, np.float32)
    alone[0, [1, 4, 5]] = 3.0, 2.9, 2.9  # the best expert is not in the group of the best pair
    rest = {"groups": 2, "kept_groups": 1}
    yield _case(rng, "a_pair_beats_the_best", 1, 8, logits=alone, scores="sigmoid", **rest)
    equal = np.zeros((2, 8), np.float32)
    yield _case(rng, "equal_groups", 2, 8, logits=equal, scores="sigmoid", **rest)


OPS = (Op("moe_route", moe_route, cases, TOLERANCE, float32=frozenset({"logits", "bias"})),)
