"""What an Ascend NPU has beside the generic kernels: norms, the gated activation, rotations,
matrices of integers, experts, filters of sampling and attention of torch_npu. None of them has run
on one yet."""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from ...common.ops.registry import KernelRegistry
from ..interface import DeviceFacts
from ..interface_kernels import Kernel, Problem
from ..torch_runtime.device import TorchDevice
from . import experts, quantised, rotary, sampling, token_rounded
from .attention import FusedInferAttention
from .library import PACKAGE, PRIORITY, refusal


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Of no rows the documentation says nothing, so they do not reach the library."""
    if not x.numel():
        return torch.empty_like(x)
    result: Tensor = import_module(PACKAGE).npu_rms_norm(x, weight, eps)[0]
    return result


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if not x.numel():
        return torch.empty_like(x), torch.empty_like(x)
    normed, _, total = import_module(PACKAGE).npu_add_rms_norm(x, residual, weight, eps)
    return normed, total


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """The library takes both halves in one tensor."""
    if not gate.numel():
        return torch.empty_like(gate)
    result: Tensor = import_module(PACKAGE).npu_swiglu(torch.cat((gate, up), dim=-1), -1)
    return result


def _norm_requires(facts: DeviceFacts, problem: Problem) -> str | None:
    size = 4 if problem.dtype == "float32" else 2
    if problem.dims.get("weight_bytes", size) != size:
        return "its weights have the dtype of the activations, this model's are float32"
    return _requires(facts, problem)


def _requires(facts: DeviceFacts, problem: Problem) -> str | None:
    reason = refusal(facts)
    if reason is not None:
        return reason
    if problem.dtype not in facts.dtypes:
        return f"{facts.name} has no {problem.dtype}"
    return None


def register(registry: KernelRegistry, device: TorchDevice) -> None:
    for kernel in (
        Kernel("rms_norm", PACKAGE, _norm_requires, rms_norm, PRIORITY),
        Kernel("add_rms_norm", PACKAGE, _norm_requires, add_rms_norm, PRIORITY),
        Kernel("silu_mul", PACKAGE, _requires, silu_mul, PRIORITY),
        *quantised.kernels(device),
        token_rounded.kernel(device),
        *rotary.KERNELS,
        *experts.KERNELS,
        *sampling.KERNELS,
    ):
        registry.add(kernel)
    registry.add_attention(FusedInferAttention(device), PRIORITY)
