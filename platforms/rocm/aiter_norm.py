"""RMS norms of AMD's aiter library. Written against amd-aiter 0.1.7 (`aiter/ops/rmsnorm.py`:
`rmsnorm2d_fwd(input, weight, epsilon)`, `rmsnorm2d_fwd_with_add(out, input, residual_in,
residual_out, weight, epsilon)`); not yet run on a device."""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from ..interface import DeviceFacts
from ..interface_kernels import Kernel, Problem
from .aiter_library import refusal

LARGEST_WIDTH = 8192
"""Columns that the library's one-pass pipelines are built for."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The kernel reads a contiguous matrix: a strided view of more axes faulted on gfx942
    (ROCm/aiter#2943)."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    result: Tensor = import_module("aiter").rmsnorm2d_fwd(rows, weight, eps)
    return result.view(x.shape)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x, residual = x.contiguous(), residual.contiguous()
    normed, total = torch.empty_like(x), torch.empty_like(x)
    import_module("aiter").rmsnorm2d_fwd_with_add(normed, x, residual, total, weight, eps)
    return normed, total


def requires(facts: DeviceFacts, problem: Problem) -> str | None:
    reason = refusal(facts)
    if reason is not None:
        return reason
    if problem.dtype not in ("bfloat16", "float16"):
        return f"serves bfloat16 and float16, not {problem.dtype}"
    if problem.dims.get("weight_bytes", 2) != 2:
        return "its weights have the dtype of the activations, this model's are float32"
    width = problem.dims.get("width", 0)
    if width > LARGEST_WIDTH:
        return f"rows of up to {LARGEST_WIDTH} columns, not {width}"
    return None


def norms(priority: int) -> list[Kernel]:
    return [
        Kernel("rms_norm", "aiter", requires, rms_norm, priority),
        Kernel("add_rms_norm", "aiter", requires, add_rms_norm, priority),
    ]
