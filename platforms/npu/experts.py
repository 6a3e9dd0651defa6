"""Experts by `npu_grouped_matmul`: all of a layer's products in two calls, with nothing read on the
host. Page: op-plugin, `torch_npu-npu_grouped_matmul.md`, the scene of single tensors grouped along
rows. Not yet run on a device.

Biases are added outside: the op takes 1-D ones, and experts in one tensor would need two axes.
Routing stays with torch: the page of `npu_moe_gating_top_k_softmax` does not say which of equal
experts it takes, and the contract does.
"""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from ..interface import DeviceFacts
from ..interface_kernels import Kernel, Problem
from ..torch_runtime.activations import clamped_swiglu
from ..torch_runtime.experts import moe_route
from .library import PACKAGE, PRIORITY, refusal

BY_ROWS, ONE_RESULT, CUMULATIVE = 0, 3, 0  # group_type, split_item, group_list_type
MOST_EXPERTS, INNER_LIMIT = 1024, 65536


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
    if not x.numel():
        return torch.empty_like(x)
    expert_of, order = torch.sort(experts.reshape(-1), stable=True)
    row_of = order // experts.shape[1]
    numbers = torch.arange(len(gate_up), device=x.device)
    ends = torch.searchsorted(expert_of, numbers, right=True)
    both = _products(x[row_of], gate_up, ends)
    if gate_up_bias is not None:
        both = both + gate_up_bias[expert_of]
    if limit:
        gate, up = both.chunk(2, dim=-1)
        inner = clamped_swiglu(gate, up, limit, slope, offset, clamp_after)
    else:
        inner = import_module(PACKAGE).npu_swiglu(both, -1)
    made = _products(inner, down, ends)
    if down_bias is not None:
        made = made + down_bias[expert_of]
    factor = weights.float().reshape(-1)[order].unsqueeze(-1)
    result = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    return result.index_add_(0, row_of, made.float() * factor).to(x.dtype)


def moe(
    x: Tensor, router_logits: Tensor, gate_up: Tensor, down: Tensor, top_k: int, renormalise: bool
) -> Tensor:
    weights, experts = moe_route(router_logits, "softmax", top_k, renormalise)
    return moe_experts(x, experts, weights, gate_up, down)


def _products(x: Tensor, stack: Tensor, ends: Tensor) -> Tensor:
    """x (M, K) by expert, stack (E, N, K), ends (E,) int64 running counts -> (M, N)."""
    (result,) = import_module(PACKAGE).npu_grouped_matmul(
        [x.contiguous()],
        [stack.transpose(1, 2)],
        group_list=ends,
        split_item=ONE_RESULT,
        group_type=BY_ROWS,
        group_list_type=CUMULATIVE,
    )
    made: Tensor = result
    return made


def _requires(facts: DeviceFacts, problem: Problem) -> str | None:
    reason = refusal(facts)
    if reason is not None:
        return reason
    if problem.weights:
        return f"has no {problem.weights} weights"
    if problem.dtype not in facts.dtypes:
        return f"{facts.name} has no {problem.dtype}"
    dims = problem.dims
    if dims.get("experts", 1) > MOST_EXPERTS:
        return f"up to {MOST_EXPERTS} experts, not {dims['experts']}"
    widest = max(dims.get("parts", 2) * dims.get("n", 1), dims.get("k", 1))
    if widest >= INNER_LIMIT:
        return f"sides below {INNER_LIMIT}, not {widest}"
    return None


KERNELS = (
    Kernel("moe_experts", PACKAGE, _requires, moe_experts, PRIORITY),
    Kernel("moe", PACKAGE, _requires, moe, PRIORITY),
)
