"""Mixtures of experts: the experts of tokens whose routes are known, and the whole layer with
softmax routing (Qwen3-MoE's form)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ...platforms.interface_kernels import Case, Op
from .activation import clamped_swiglu, silu_mul
from .contract import F32, I64, REDUCTION, normal
from .moe_route import moe_route


def moe_experts(
    x: F32,
    experts: I64,
    weights: F32,
    gate_up: F32,
    down: F32,
    gate_up_bias: F32 | None = None,
    down_bias: F32 | None = None,
    limit: float = 0.0,
    slope: float = 1.0,
    offset: float = 0.0,
    clamp_after: bool = False,
) -> F32:
    """x (T, H), experts (T, k) int, weights (T, k) float32, gate_up (E, 2I, H) with the gate rows
    first, down (E, H, I), gate_up_bias (E, 2I), down_bias (E, H) -> (T, H): the weighted sum of
    down(activation(gate(x), up(x))) over each token's experts.

    The activation is `silu_mul`, or with a limit above 0 `clamped_swiglu(…, limit, slope, offset,
    clamp_after)`.
    """
    form = limit, slope, offset, clamp_after
    result = np.zeros(x.shape, np.float64)
    inner = down.shape[2]
    for row in range(len(x)):
        for expert, weight in zip(experts[row], weights[row].astype(np.float64), strict=True):
            both = gate_up[expert].astype(np.float64) @ x[row]
            if gate_up_bias is not None:
                both = both + gate_up_bias[expert]
            gate, up = both[:inner], both[inner:]
            hidden = clamped_swiglu(gate, up, *form) if limit else silu_mul(gate, up)
            made = down[expert].astype(np.float64) @ hidden
            result[row] += weight * (made if down_bias is None else made + down_bias[expert])
    return result.astype(np.float32)


def moe(x: F32, router_logits: F32, gate_up: F32, down: F32, top_k: int, renormalise: bool) -> F32:
    """x (T, H), router_logits (T, E), gate_up (E, 2I, H) with the gate rows first, down (E, H, I)
    -> (T, H): `moe_route` by softmax, then `moe_experts`."""
    weights, experts = moe_route(router_logits, "softmax", top_k, renormalise)
    return moe_experts(x, experts, weights, gate_up, down)


def _matrices(rng: np.random.Generator, experts: int, width: int, inner: int) -> dict[str, F32]:
    return {
        "gate_up": normal(rng, experts, 2 * inner, width, scale=width**-0.5),
        "down": normal(rng, experts, width, inner, scale=inner**-0.5),
    }


def cases(rng: np.random.Generator) -> Iterable[Case]:
    for name, rows, width, inner, experts, top_k, renormalise in [
        ("one_row", 1, 32, 24, 4, 2, True),
        ("raw_weights", 6, 16, 40, 8, 3, False),
        ("one_expert_each", 5, 16, 8, 4, 1, False),
        ("all_experts", 3, 16, 8, 4, 4, True),
        ("idle_experts", 2, 16, 8, 16, 2, True),
        ("no_rows", 0, 16, 8, 4, 2, True),
        ("top_8", 7, 48, 33, 20, 8, True),
        ("many_rows_an_expert", 70, 31, 17, 3, 1, False),
    ]:
        logits = normal(rng, rows, experts, scale=2.0)
        yield _case(rng, name, logits, (width, inner), top_k, renormalise)
    tied = np.array([[1.0, 2.0, 2.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]], np.float32)
    yield _case(rng, "ties_go_to_the_lowest_id", tied, (16, 8), 2, True)
    # Every row to expert 3, nobody to expert 0.
    crowd = normal(rng, 30, 4) + np.array([-40, 0, 0, 40], np.float32)
    yield _case(rng, "one_expert_for_all", crowd, (20, 8), 2, False)
    # As many rows an expert as tiles have, one less and one more.
    counts = (1, 15, 16, 17, 0, 33, 64)
    favourite = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    logits = normal(rng, len(favourite), len(counts))
    logits[np.arange(len(favourite)), favourite] += 40
    yield _case(rng, "counts_about_tiles", logits, (8, 4), 1, True)


def _case(
    rng: np.random.Generator,
    name: str,
    logits: F32,
    sizes: tuple[int, int],
    top_k: int,
    renormalise: bool,
) -> Case:
    args: dict[str, Any] = {
        "x": normal(rng, len(logits), sizes[0]),
        "router_logits": logits,
        **_matrices(rng, logits.shape[1], *sizes),
        "top_k": top_k,
        "renormalise": renormalise,
    }
    return Case(name, args)


def experts_cases(rng: np.random.Generator) -> Iterable[Case]:
    gpt_oss = {"limit": 7.0, "slope": 1.702, "offset": 1.0}
    for name, rows, width, inner, count, top_k, biased, form in [
        ("one_row", 1, 32, 24, 4, 2, False, {}),
        ("one_each", 6, 16, 8, 4, 1, False, {}),
        ("no_rows", 0, 16, 8, 4, 2, False, {}),
        ("odd", 9, 33, 17, 5, 3, False, {}),
        ("biased", 7, 24, 16, 6, 2, True, {}),
        ("clamped", 5, 16, 12, 4, 2, False, {"limit": 0.5}),
        ("clamped_after", 5, 16, 12, 4, 2, False, {"limit": 0.25, "clamp_after": True}),
        ("sloped_and_biased", 5, 16, 12, 4, 2, True, gpt_oss),
        ("top_8", 40, 16, 8, 12, 8, False, {}),
    ]:
        order = rng.permuted(np.tile(np.arange(count), (rows, 1)), axis=1)
        yield Case(
            name,
            {
                "x": normal(rng, rows, width),
                "experts": order[:, :top_k].astype(np.int64),
                "weights": rng.uniform(0.0, 1.0, (rows, top_k)).astype(np.float32),
                **_matrices(rng, count, width, inner),
                "gate_up_bias": normal(rng, count, 2 * inner) if biased else None,
                "down_bias": normal(rng, count, width) if biased else None,
                **form,
            },
        )


def stack_dims(args: Mapping[str, Any]) -> dict[str, int]:
    """Of the first of the two stacks."""
    experts, both, k = args["gate_up"].shape
    return {"experts": experts, "parts": 2, "n": both // 2, "k": k}


OPS = (
    Op(
        "moe_experts",
        moe_experts,
        experts_cases,
        REDUCTION,
        float32=frozenset({"weights"}),
        dims=stack_dims,
    ),
    Op("moe", moe, cases, REDUCTION, parts=("moe_route", "moe_experts"), dims=stack_dims),
)
