"""torch's operations that only an XPU has, on host tensors, behind torch's own schemas, with the
checks of their source: `aten/src/ATen/native/mkldnn/xpu/Blas.cpp` of torch 2.13. Where it checks
nothing and an XPU would read on, the emulator refuses: sides that do not fit, scales of another
dtype than the activations (as torchao, its user, gives them), strided weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def need(true: bool, what: str) -> None:
    if not true:
        raise RuntimeError(f"_weight_int4pack_mm_xpu: {what}")


def weight_int4pack_mm(a: Tensor, b: Tensor, group: int, scale: Tensor, zeros: Tensor) -> Tensor:
    """a (M, K) @ ((numbers of b (N, K / 8) - zeros) * scale).T, zeros and scale (K / group, N)."""
    need(a.dtype in FLOATS, "expect A to be either 32-bit or 16-bit float tensor")
    need(a.dim() == 2, "expect A to be 2D tensor")
    need(a.is_contiguous(), "expect A to be contiguous")
    need(b.dtype == torch.int32, "expect B to be int32 tensor")
    need(b.dim() == 2, "expect B to 2d tensor")
    need(b.is_contiguous(), "B is not contiguous")
    need(zeros.dtype == torch.int8, "expect qZeros to be int8 tensor currently")
    need(group > 1 and group % 32 == 0, f"qGroupSize a multiple of 32, got {group}")
    outputs, columns = len(b), 8 * b.shape[1]
    need(a.shape[1] == columns, f"A has {a.shape[1]} columns, B {columns}")
    need(columns % group == 0, f"{columns} columns in groups of {group}")
    for name, tensor in (("qScale", scale), ("qZeros", zeros)):
        shape = columns // group, outputs
        need(tuple(tensor.shape) == shape, f"{name} is {tuple(tensor.shape)}, not {shape}")
        need(tensor.is_contiguous(), f"{name} is not contiguous")
    need(scale.dtype == a.dtype, f"qScale is {scale.dtype}, A {a.dtype}")
    parts = torch.stack([(b.long() >> (4 * place)) & 15 for place in range(8)], -1).flatten(1)
    wide = [x.t().float().repeat_interleave(group, 1) for x in (zeros, scale)]
    return (a.float() @ ((parts - wide[0]) * wide[1]).t()).to(a.dtype)


@contextmanager
def installed() -> Iterator[None]:
    """For the time of a test, host tensors have the operation too."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_weight_int4pack_mm_with_scales_and_zeros", weight_int4pack_mm, "CPU")
    try:
        yield
    finally:
        library._destroy()
