"""The gated delta rule: a linear-attention mixer whose state is one matrix per head, kept in slots.

Yang, Kautz and Hatamizadeh 2024 ("Gated Delta Networks"), equation 10; as Qwen3-Next and Qwen3.5
use it. A kernel may follow the recurrence, or the chunked form of the same paper (section 3.3).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...platforms.interface_kernels import Case, Op, Tolerance
from .contract import F32, I32, normal
from .state_rows import ROWS, StateRows, each

TOLERANCE = {
    "float32": Tolerance(2e-5, 2e-5),
    "bfloat16": Tolerance(1e-2, 1e-2),
    "float16": Tolerance(2e-3, 2e-3),
}
"""The state and all arithmetic are float32 whatever the dtype: only the result is rounded."""

EPS = 1e-6
F64 = NDArray[np.float64]


def gated_delta(
    q: F32,
    k: F32,
    v: F32,
    a: F32,
    b: F32,
    a_log: F32,
    dt_bias: F32,
    state: F32,
    slots: I32,
    query_start: I32,
    context_lens: I32,
) -> tuple[F32, F32]:
    """q, k (T, Hk, Dk); v (T, Hv, Dv); a, b (T, Hv); a_log, dt_bias (Hv,) float32; state
    (S, Hv, Dk, Dv) float32; slots (R,), query_start (R+1,), context_lens (R,) as `state_rows` says
    -> (T, Hv, Dv) and the state, changed in place.

    Value head h reads key head h // (Hv / Hk). Per value head, from one token to the next:
    q' = q / sqrt(sum(q^2) + 1e-6) / sqrt(Dk), k' = k / sqrt(sum(k^2) + 1e-6),
    g = -exp(a_log) * softplus(a + dt_bias), beta = sigmoid(b),
    S := exp(g) * S;  S := S + k' (beta * (v - S^T k'))^T;  o = S^T q'.
    """
    result, state = np.zeros(v.shape, np.float64), state.copy()
    groups = v.shape[1] // q.shape[1]
    unit_q = np.repeat(_unit(q) / np.sqrt(q.shape[2]), groups, axis=1)
    unit_k = np.repeat(_unit(k), groups, axis=1)
    decay = np.exp(-np.exp(a_log.astype(np.float64)) * _softplus(a.astype(np.float64) + dt_bias))
    beta = 1.0 / (1.0 + np.exp(-b.astype(np.float64)))
    for _, tokens, slot, fresh in each(slots, query_start, context_lens):
        s = np.zeros(state.shape[1:]) if fresh else state[slot].astype(np.float64)
        for t in range(tokens.start, tokens.stop):
            s = s * decay[t][:, None, None]
            change = beta[t][:, None] * (v[t] - np.einsum("hkv,hk->hv", s, unit_k[t]))
            s = s + unit_k[t][:, :, None] * change[:, None, :]
            result[t] = np.einsum("hkv,hk->hv", s, unit_q[t])
        state[slot] = s
    return result.astype(np.float32), state


def _unit(x: F32) -> F64:
    wide = x.astype(np.float64)
    return wide / np.sqrt((wide * wide).sum(axis=-1, keepdims=True) + EPS)


def _softplus(x: F64) -> F64:
    return np.maximum(x, 0.0) + np.log1p(np.exp(-np.abs(x)))


def cases(rng: np.random.Generator) -> Iterable[Case]:
    for rows in ROWS:
        yield _build(rng, rows)
    mixed = next(rows for rows in ROWS if rows.name == "mixed")
    yield _build(rng, mixed, "odd_dims", heads=(3, 3), dims=(7, 5))
    yield _build(rng, mixed, "wide_values", heads=(1, 4), dims=(8, 40))
    chunks = StateRows("chunks", ((0, 64), (9, 65), (0, 63), (128, 130)))
    yield _build(rng, chunks, heads=(1, 2), dims=(16, 16))
    yield _build(rng, chunks, "long_memory", heads=(1, 2), dims=(16, 16), a_log=-6.0)
    yield _build(rng, chunks, "no_memory", heads=(1, 2), dims=(16, 16), a_log=4.0)
    zeros = _build(rng, mixed, "zero_keys_and_queries")
    flat = {name: np.zeros_like(zeros.args[name]) for name in ("q", "k")}
    yield Case(zeros.name, {**zeros.args, **flat})


def _build(
    rng: np.random.Generator,
    rows: StateRows,
    name: str = "",
    heads: tuple[int, int] = (2, 4),
    dims: tuple[int, int] = (16, 24),
    a_log: float = 0.0,
) -> Case:
    tokens, (key_heads, value_heads), (key_dim, value_dim) = rows.tokens, heads, dims
    where = rows.arguments(rng)
    args: dict[str, Any] = {
        "q": normal(rng, tokens, key_heads, key_dim),
        "k": normal(rng, tokens, key_heads, key_dim),
        "v": normal(rng, tokens, value_heads, value_dim),
        "a": normal(rng, tokens, value_heads),
        "b": normal(rng, tokens, value_heads, scale=2.0),
        "a_log": a_log + normal(rng, value_heads, scale=0.5),
        "dt_bias": normal(rng, value_heads),
        "state": rows.state(rng, where["slots"], value_heads, key_dim, value_dim, scale=0.3),
        **where,
    }
    return Case(name or rows.name, args)


OPS = (
    Op(
        "gated_delta",
        gated_delta,
        cases,
        TOLERANCE,
        float32=frozenset({"a_log", "dt_bias", "state"}),
        in_place=frozenset({"state"}),
    ),
)
