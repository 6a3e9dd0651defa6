"""Generic kernels of mixtures of experts: routing, the experts, and both together."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own spelling)
from torch import Tensor

from ...common.ops.moe_route import EPS
from .activations import clamped_swiglu, silu_mul


def moe_route(
    logits: Tensor,
    scores: str,
    top_k: int,
    renormalise: bool,
    scale: float = 1.0,
    bias: Tensor | None = None,
    groups: int = 1,
    kept_groups: int = 1,
    table: Tensor | None = None,
    token_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    every = SCORES[scores](logits.float())
    if table is not None and token_ids is not None:
        chosen = table[token_ids].long()
    else:
        # Softmax keeps the order of logits, and may lose small differences.
        plain = logits.float() if scores == "softmax" and bias is None else every
        choosing = plain if bias is None else plain + bias
        choosing = choosing if groups == 1 else _within_groups(choosing, groups, kept_groups)
        chosen = _largest(choosing, top_k)
    weights = every.gather(1, chosen)
    if renormalise:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + EPS)
    return (weights if scale == 1.0 else weights * scale), chosen


SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": partial(torch.softmax, dim=-1),
    "sigmoid": torch.sigmoid,
    "sqrt_softplus": lambda logits: torch.sqrt(
        logits.clamp(min=0.0) + logits.abs().neg().exp().log1p()
    ),
}


def _largest(x: Tensor, count: int) -> Tensor:
    """A stable sort, not topk: equals go to the lowest place."""
    return torch.sort(x, dim=-1, descending=True, stable=True)[1][..., :count]


def _within_groups(choosing: Tensor, groups: int, kept: int) -> Tensor:
    by_group = choosing.unflatten(-1, (groups, -1))
    best = _largest(by_group.topk(2, dim=-1)[0].sum(dim=-1), kept)
    allowed = torch.zeros(by_group.shape[:2], dtype=torch.bool, device=choosing.device)
    allowed.scatter_(1, best, True)
    return by_group.masked_fill(~allowed.unsqueeze(-1), -torch.inf).flatten(1)


def moe_experts(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    limit: float = 0.0,
    slope: float = 1.0,
    offset: float = 0.0,
    clamp_after: bool = False,
) -> Tensor:
    """Every expert is one pair of products over the rows that chose it; experts are visited in
    order and the visit reads their row counts on the host."""
    top_k, form = experts.shape[1], (limit, slope, offset, clamp_after)
    expert_of, order = torch.sort(experts.reshape(-1), stable=True)
    row_of = order // top_k
    factor = weights.float().reshape(-1)[order].unsqueeze(-1)
    counts = torch.bincount(expert_of, minlength=len(gate_up)).tolist()
    result = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    begin = 0
    for expert, count in enumerate(counts):
        if count:
            rows = row_of[begin : begin + count]
            bias = None if gate_up_bias is None else gate_up_bias[expert]
            gate, up = F.linear(x[rows], gate_up[expert], bias).chunk(2, dim=-1)
            inner = clamped_swiglu(gate, up, *form) if limit else silu_mul(gate, up)
            bias = None if down_bias is None else down_bias[expert]
            hidden = F.linear(inner, down[expert], bias)
            result.index_add_(0, rows, hidden.float() * factor[begin : begin + count])
            begin += count
    return result.to(x.dtype)


def moe(
    x: Tensor, router_logits: Tensor, gate_up: Tensor, down: Tensor, top_k: int, renormalise: bool
) -> Tensor:
    weights, experts = moe_route(router_logits, "softmax", top_k, renormalise)
    return moe_experts(x, experts, weights, gate_up, down)
