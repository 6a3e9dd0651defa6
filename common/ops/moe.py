"""Mixture of experts with softmax routing over all experts (Qwen3-MoE's form)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ...platforms.interface_kernels import Case, Op
from .activation import silu_mul
from .contract import F32, REDUCTION, normal


def moe(x: F32, router_logits: F32, gate_up: F32, down: F32, top_k: int, renormalise: bool) -> F32:
    """x (T, H), router_logits (T, E), gate_up (E, 2I, H) with the gate rows first, down (E, H, I)
    -> (T, H).

    Softmax over all experts in float32, the `top_k` largest chosen (lowest id among equals), their
    weights optionally divided by their sum; each expert is down(silu(gate(x)) * up(x)).
    """
    logits = router_logits.astype(np.float64)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True, initial=-np.inf))
    weights /= weights.sum(axis=-1, keepdims=True)
    chosen = np.argsort(-router_logits, axis=-1, kind="stable")[:, :top_k]
    result = np.zeros(x.shape, np.float64)
    inner = down.shape[2]
    for row in range(len(x)):
        scale = weights[row, chosen[row]]
        if renormalise:
            scale = scale / scale.sum()
        for expert, factor in zip(chosen[row], scale, strict=True):
            both = gate_up[expert].astype(np.float64) @ x[row]
            hidden = silu_mul(both[:inner], both[inner:])
            result[row] += factor * (down[expert].astype(np.float64) @ hidden)
    return result.astype(np.float32)


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
        yield Case(
            name,
            {
                "x": normal(rng, rows, width),
                "router_logits": normal(rng, rows, experts, scale=2.0),
                "gate_up": normal(rng, experts, 2 * inner, width, scale=width**-0.5),
                "down": normal(rng, experts, width, inner, scale=inner**-0.5),
                "top_k": top_k,
                "renormalise": renormalise,
            },
        )
    tied = np.array([[1.0, 2.0, 2.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]], np.float32)
    yield Case(
        "ties_go_to_the_lowest_id",
        {
            "x": normal(rng, 2, 16),
            "router_logits": tied,
            "gate_up": normal(rng, 5, 16, 16, scale=0.25),
            "down": normal(rng, 5, 16, 8, scale=0.35),
            "top_k": 2,
            "renormalise": True,
        },
    )
    # Every row to expert 3, nobody to expert 0.
    crowd = normal(rng, 30, 4) + np.array([-40, 0, 0, 40], np.float32)
    yield Case(
        "one_expert_for_all",
        {
            "x": normal(rng, 30, 20),
            "router_logits": crowd,
            "gate_up": normal(rng, 4, 16, 20, scale=0.25),
            "down": normal(rng, 4, 20, 8, scale=0.35),
            "top_k": 2,
            "renormalise": False,
        },
    )


OPS = (Op("moe", moe, cases, REDUCTION),)
