"""Norms, the gated activation and rotations. Pages: `npu_rms_norm` and `npu_swiglu` of the API
reference (Ascend Extension for PyTorch 7.0 and 7.2, RmsNorm and SwiGlu: float16, bfloat16, float32;
1 to 8 axes; gamma of the input's dtype and last axes). `npu_add_rms_norm` has no page: its order of
results and its rounding are those of op-plugin's own `test_npu_add_rms_norm.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import FLOATS, contiguous, dtype_of, need, not_emulated


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


def npu_rotary_mul(
    input: Tensor,
    r1: Tensor,
    r2: Tensor,
    rotary_mode: str = "half",
    rotate: Tensor | None = None,
) -> Tensor:
    """r1 * input + r2 * (input, a quarter turn on). Page: op-plugin, `torch_npu-npu_rotary_mul.md`,
    its scene `jit_compile=False`. Which layout the input has shows in the angles' shape."""
    op = "npu_rotary_mul"
    not_emulated(op, rotate=rotate)
    need(rotary_mode in ("half", "interleave"), op, f"rotary_mode {rotary_mode}")
    for name, tensor in (("input", input), ("r1", r1), ("r2", r2)):
        dtype_of(op, name, tensor, FLOATS)
        need(tensor.dim() == 4, op, f"{name} has {tensor.dim()} axes, not 4")
        need(tensor.dtype == input.dtype, op, f"{name} is {tensor.dtype}: not said to differ")
    contiguous(op, input=input, r1=r1, r2=r2)
    need(r1.shape == r2.shape, op, "r1 and r2 differ in shape")
    need(input.numel() > 0, op, "an empty input is not documented")
    need(bool((r1.abs() <= 1).all() and (r2.abs() <= 1).all()), op, "r1 and r2 are within [-1, 1]")
    _rotary_layout(input, r1, rotary_mode)
    wide, dim = input.float(), input.shape[-1]
    if rotary_mode == "half":
        turned = torch.cat((-wide[..., dim // 2 :], wide[..., : dim // 2]), dim=-1)
    else:
        turned = torch.stack((-wide[..., 1::2], wide[..., ::2]), dim=-1).flatten(-2)
    return (r1.float() * wide + r2.float() * turned).to(input.dtype)


def _rotary_layout(input: Tensor, angles: Tensor, mode: str) -> None:
    op = "npu_rotary_mul"
    a, b, c, dim = input.shape
    need(dim < 896 and dim % 2 == 0, op, f"D is even and below 896, not {dim}")
    # layout: (B, N), and angles that are said to fit, those of `interleave` first
    layouts = {
        "BNSD": ((a, b), [(1, 1, c, dim), (a, 1, c, dim), (a, b, c, dim)]),
        "BSND": ((a, c), [(1, b, 1, dim), (a, b, 1, dim), (a, b, c, dim)]),
        "SBND": ((b, c), [(a, 1, 1, dim), (a, b, 1, dim), (a, b, c, dim)]),
    }
    for (batch, heads), shapes in layouts.values():
        small = batch * heads < 1000 if mode == "interleave" else max(batch, heads) < 1000
        if small and tuple(angles.shape) in shapes[: 1 if mode == "interleave" else None]:
            return
    need(False, op, f"angles {tuple(angles.shape)} for {tuple(input.shape)} ({mode})")
