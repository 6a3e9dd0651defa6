"""The short causal convolution before a recurrent mixer, with its last inputs kept in slots.

Depthwise: every channel has its own few weights (Gu and Dao 2023, section 3.4, figure 3).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ...platforms.interface_kernels import Case, Op, Tolerance
from .contract import F32, I32, POINTWISE, normal
from .state_rows import ROWS, StateRows, each

TOLERANCE = {**POINTWISE, "float32": Tolerance(5e-6, 5e-6), "bfloat16": Tolerance(2e-2, 2e-2)}


def conv1d_update(
    x: F32,
    weight: F32,
    bias: F32 | None,
    state: F32,
    slots: I32,
    query_start: I32,
    context_lens: I32,
    activate: bool,
) -> tuple[F32, F32]:
    """x (T, C) inputs, weight (C, K), bias (C,) or None, state (S, K-1, C) the last K-1 inputs of
    each slot, oldest first; slots (R,), query_start (R+1,), context_lens (R,) as `state_rows` says
    -> (T, C) and the state, changed in place.

    y[t] = sum over i < K of weight[:, i] * x[t - K + 1 + i], plus bias, where inputs before the
    row's first token come from its state; then y * sigmoid(y) if `activate`.
    """
    result, state = np.zeros(x.shape, np.float64), state.copy()
    taps = weight.shape[1]
    for _, tokens, slot, fresh in each(slots, query_start, context_lens):
        past = np.zeros_like(state[slot]) if fresh else state[slot]
        seen = np.concatenate([past, x[tokens]]).astype(np.float64)
        for t in range(tokens.stop - tokens.start):
            result[tokens.start + t] = (seen[t : t + taps] * weight.T).sum(axis=0)
        state[slot] = seen[len(seen) - (taps - 1) :]
    if bias is not None:
        active = np.repeat(np.asarray(slots) >= 0, np.diff(query_start))
        result[active] += bias
    if activate:
        result = result / (1.0 + np.exp(-result))
    return result.astype(np.float32), state


def cases(rng: np.random.Generator) -> Iterable[Case]:
    for rows in ROWS:
        yield _build(rng, rows, channels=24, taps=4)
    mixed = next(rows for rows in ROWS if rows.name == "mixed")
    yield _build(rng, mixed, 33, 4, "odd_channels", biased=True)
    yield _build(rng, mixed, 16, 2, "two_taps")
    yield _build(rng, mixed, 16, 8, "more_taps_than_tokens", activate=False)
    yield _build(rng, StateRows("", ((0, 130), (64, 65))), 8, 4, "long", biased=True)


def _build(
    rng: np.random.Generator,
    rows: StateRows,
    channels: int,
    taps: int,
    name: str = "",
    biased: bool = False,
    activate: bool = True,
) -> Case:
    where = rows.arguments(rng)
    args = {
        "x": normal(rng, rows.tokens, channels),
        "weight": normal(rng, channels, taps, scale=0.5),
        "bias": normal(rng, channels) if biased else None,
        "state": rows.state(rng, where["slots"], taps - 1, channels),
        **where,
        "activate": activate,
    }
    return Case(name or rows.name, args)


OPS = (Op("conv1d_update", conv1d_update, cases, TOLERANCE, in_place=frozenset({"state"})),)
