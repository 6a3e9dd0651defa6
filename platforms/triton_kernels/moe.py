"""A mixture of experts with softmax routing, whose routes are found on the device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .experts import moe_experts
from .launch import rows_of
from .packed_experts import PackedExperts
from .tuning import Tuning, power_of_two


@triton.jit
def route_kernel(
    logits_ptr,
    ids_ptr,
    factors_ptr,
    experts,
    logits_stride,
    TOP_K: tl.constexpr,
    RENORMALISE: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Softmax over all experts; the TOP_K largest, the lowest id among equals."""
    row = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, EXPERTS)
    there = expert < experts
    logit = tl.load(logits_ptr + row * logits_stride + expert, mask=there, other=float("-inf"))
    logit = logit.to(tl.float32)
    left = tl.where(logit == logit, logit, float("-inf"))
    weight = tl.exp(logit - tl.max(left, axis=0))
    total = tl.sum(tl.where(there, weight, 0.0), axis=0)
    taken = tl.full((EXPERTS,), TOP_K, tl.int32)
    for place in tl.static_range(TOP_K):
        free = there & (taken == TOP_K)
        most = tl.max(tl.where(free, left, float("-inf")), axis=0)
        chosen = tl.min(tl.where(free & (left == most), expert, EXPERTS), axis=0)
        taken = tl.where(expert == chosen, place, taken)
    picked = there & (taken < TOP_K)
    if RENORMALISE:  # a NaN anywhere makes all of a row's factors NaN, as in a softmax
        total = tl.sum(tl.where(picked, weight, 0.0), axis=0) + 0.0 * total
    at = row * TOP_K + taken
    tl.store(ids_ptr + at, expert, mask=picked)
    tl.store(factors_ptr + at, weight / total, mask=picked)


def moe(
    tuning: Tuning,
    x: Tensor,
    router_logits: Tensor,
    gate_up: Tensor | PackedExperts,
    down: Tensor | PackedExperts,
    top_k: int,
    renormalise: bool,
) -> Tensor:
    ids, factors = _route(rows_of(router_logits), top_k, renormalise)
    return moe_experts(tuning, x, ids, factors, gate_up, down)


def _route(logits: Tensor, top_k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    rows, experts = logits.shape
    ids = torch.empty((rows, top_k), dtype=torch.int32, device=logits.device)
    factors = torch.empty((rows, top_k), dtype=torch.float32, device=logits.device)
    if rows:
        route_kernel[(rows,)](
            logits,
            ids,
            factors,
            experts,
            logits.stride(0),
            TOP_K=top_k,
            RENORMALISE=renormalise,
            EXPERTS=power_of_two(experts),
            num_warps=1,
        )
    return ids, factors
