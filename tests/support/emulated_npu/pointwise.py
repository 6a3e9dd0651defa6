"""Norms and the gated activation. Pages: `npu_rms_norm` and `npu_swiglu` of the API reference
(Ascend Extension for PyTorch 7.0 and 7.2, RmsNorm and SwiGlu: float16, bfloat16, float32; 1 to 8
axes; gamma of the input's dtype and last axes). `npu_add_rms_norm` has no page: its order of
results and its rounding are those of op-plugin's own `test_npu_add_rms_norm.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import FLOATS, dtype_of, need


def npu_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-06) -> tuple[Tensor, Tensor]:
    """(input / rms * gamma, 1 / rms float32)."""
    _norm_arguments("npu_rms_norm", input, gamma)
    axes = list(range(input.dim() - gamma.dim(), input.dim()))
    wide = input.float()
    rstd = torch.rsqrt(wide.pow(2).mean(axes, keepdim=True) + epsilon)
    return (wide * rstd * gamma.float()).to(input.dtype), rstd


def npu_add_rms_norm(
    x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-06
) -> tuple[Tensor, Tensor, Tensor]:
    """(normed, 1 / rms float32, x1 + x2)."""
    op = "npu_add_rms_norm"
    _norm_arguments(op, x1, gamma)
    need(x1.shape == x2.shape, op, f"x1 {tuple(x1.shape)} and x2 {tuple(x2.shape)} differ")
    need(x1.dtype == x2.dtype, op, f"x1 {x1.dtype} and x2 {x2.dtype} differ")
    total = x1 + x2
    normed, rstd = npu_rms_norm(total, gamma, epsilon)
    return normed, rstd, total


def npu_swiglu(input: Tensor, dim: int = -1) -> Tensor:
    """silu(first half) * second half along `dim`."""
    op = "npu_swiglu"
    dtype_of(op, "input", input, FLOATS)
    need(1 <= input.dim() <= 8, op, f"input has {input.dim()} axes, not 1 to 8")
    need(input.numel() > 0, op, "an empty input is not documented")
    need(input.shape[dim] % 2 == 0, op, f"axis {dim} has an odd size, {input.shape[dim]}")
    gate, up = input.float().chunk(2, dim)
    return (torch.nn.functional.silu(gate) * up).to(input.dtype)


def _norm_arguments(op: str, x: Tensor, gamma: Tensor) -> None:
    dtype_of(op, "x", x, FLOATS)
    need(gamma.dtype == x.dtype, op, f"gamma is {gamma.dtype}, x is {x.dtype}")
    need(1 <= x.dim() <= 8, op, f"x has {x.dim()} axes, not 1 to 8")
    fits = 1 <= gamma.dim() <= x.dim() and x.shape[x.dim() - gamma.dim() :] == gamma.shape
    need(fits, op, f"gamma {tuple(gamma.shape)} is not the last axes of x {tuple(x.shape)}")
    need(x.numel() > 0, op, "an empty x is not documented")
