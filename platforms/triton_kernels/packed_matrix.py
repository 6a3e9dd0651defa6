"""Quantised matrices as `linear` and `embedding` read them, made once, at load. Imports no Triton.

INT8    bytes (n, k), signed
INT4    bytes (n, k / 2): byte i of 32 columns holds column i low and column 16 + i high
FP8     bytes (n, k), OCP e4m3
MXFP4   as INT4, e2m1

k is padded to 32 but for FP8. Scales are (groups, n), so that neighbours in a row are neighbours in
the output. value = scale * (number - zero), or scale * number - minimum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...common.checkpoint.block_floats import MX_GROUP, SQUARE, Fp8Blocks, Mxfp4Rows
from ...common.checkpoint.quantised_rows import GROUP, QuantisedRows
from ...common.errors import KernelError
from ..interface_kernels import Problem
from ..torch_runtime.device import TorchDevice
from ..torch_runtime.rounding import round_int4, round_int8

INT8, INT4, FP8, MXFP4 = range(4)
ROUNDED = frozenset({"q4_k", "q5_k", "q6_k"})
"""Schemes whose scales are products of a float16 with six or eight bits: rounded to float16, by a
2000th at most, where exact ones would take as much memory as a third of the numbers."""
PLAIN, ZEROS, MINIMUMS = range(3)
"""What is taken from a number: nothing (8 from INT4), a zero, or a minimum from the product."""


@dataclass(frozen=True, slots=True, eq=False)
class PackedMatrix:
    """A matrix (n, k) on a device. `group` columns of `squares` outputs share a scale; a group of 0
    is all of them."""

    form: int
    shape: tuple[int, int]
    dtype: torch.dtype  # of the activations
    data: Tensor
    scales: Tensor
    group: int
    squares: int = 1
    shift: int = PLAIN
    shifts: Tensor | None = None  # zeros int8, or minimums; (groups, n)
    order: Tensor | None = None  # place in `data` -> column, where they are not the same

    @property
    def paired(self) -> bool:
        return self.form in (INT4, MXFP4)

    def depth(self, most: int) -> int:
        """Columns of a block that have one scale."""
        return min(most, self.group) if self.group else most

    @property
    def nbytes(self) -> int:
        parts = (self.data, self.scales, self.shifts, self.order)
        return sum(part.nbytes for part in parts if part is not None)


@dataclass(frozen=True, slots=True, eq=False)
class Ints:
    """A matrix of whole numbers as `PackedMatrix` has them, its scales not yet put together.
    scale (n, units), `unit` columns each; minimum likewise or None."""

    bits: int
    data: Tensor
    scale: Tensor
    minimum: Tensor | None
    columns: int
    order: Tensor | None = None

    @property
    def unit(self) -> int:
        groups = self.data.shape[1] * (2 if self.bits == 4 else 1) // GROUP
        return GROUP * groups // self.scale.shape[1]


def pack(weight: Any, problem: Problem, device: TorchDevice) -> Tensor | PackedMatrix:
    """A checkpoint's own numbers rearranged, or a tensor rounded; one without a scheme as it is."""
    if isinstance(weight, Fp8Blocks | Mxfp4Rows):
        return pack_floats([weight], problem, device)
    if isinstance(weight, Tensor) and not problem.weights:
        return weight
    return join_ints([whole_numbers(weight, problem, device)], problem)


def pack_floats(
    matrices: Sequence[Fp8Blocks | Mxfp4Rows], problem: Problem, device: TorchDevice
) -> PackedMatrix:
    """Matrices of one shape, below each other; each begins with scales of its own."""
    dtype, (n, k) = getattr(torch, problem.dtype), matrices[0].shape
    shape = n * len(matrices), k
    scales = device.to_device(np.concatenate([matrix.scales for matrix in matrices]).T)
    codes = [device.to_device(matrix.codes) for matrix in matrices]
    if isinstance(matrices[0], Fp8Blocks):
        return PackedMatrix(FP8, shape, dtype, torch.cat(codes), scales, SQUARE, SQUARE)
    numbers = (torch.stack((c & 15, c >> 4), -1).view(n, -1, GROUP) for c in codes)
    data = torch.cat([_pairs(each) for each in numbers])
    return PackedMatrix(MXFP4, shape, dtype, data, scales, MX_GROUP)


def whole_numbers(weight: Any, problem: Problem, device: TorchDevice) -> Ints:
    """Raises KernelError for what has no form."""
    if isinstance(weight, QuantisedRows):
        if problem.op == "embedding" and weight.order is not None:
            raise KernelError("An embedding with columns out of order is not served.")
        q, scale = device.to_device(weight.q), device.to_device(weight.scale)
        minimum = None if weight.minimum is None else device.to_device(weight.minimum)
        order = None if weight.order is None else device.to_device(weight.order)
        return _numbers(weight.bits, q, scale, minimum, weight.columns, order)
    if isinstance(weight, Tensor) and problem.weights == "int8":
        return _numbers(8, *round_int8(weight), None, weight.shape[1])
    if isinstance(weight, Tensor) and problem.weights == "int4":
        return _numbers(4, *round_int4(weight), weight.shape[1])
    raise KernelError(f"'triton' has no form for {type(weight).__name__}.")


def _numbers(
    bits: int,
    q: Tensor,
    scale: Tensor,
    minimum: Tensor | None,
    columns: int,
    order: Tensor | None = None,
) -> Ints:
    """q (n, groups, 32) whole numbers of any dtype; scale (n, groups) or (n, 2 * groups)."""
    data = _pairs(q.to(torch.uint8)) if bits == 4 else q.to(torch.int8).flatten(1).contiguous()
    if minimum is not None:
        minimum = minimum.float().repeat_interleave(scale.shape[1] // minimum.shape[1], 1)
    return Ints(bits, data, scale.float(), minimum, columns, order)


def join_ints(parts: Sequence[Ints], problem: Problem) -> PackedMatrix:
    """Matrices of one form below each other; one's `order` is kept where it is the only one."""
    first, bits = parts[0], parts[0].bits
    scale = torch.cat([part.scale for part in parts])
    shift, shifts = PLAIN, None
    if any(part.minimum is not None for part in parts):
        # A file may give minimums to some only.
        zero = 8.0 if bits == 4 else 0.0
        each = [p.scale * zero if p.minimum is None else p.minimum for p in parts]
        shift, shifts = _zeros_or_minimums(scale, torch.cat(each))
    span, rounded = _span([x for x in (scale, shifts) if x is not None]), problem.weights in ROUNDED
    return PackedMatrix(
        INT4 if bits == 4 else INT8,
        (len(scale), first.columns),
        getattr(torch, problem.dtype),
        torch.cat([part.data for part in parts]) if len(parts) > 1 else first.data,
        _halved(scale[:, ::span].t().contiguous(), rounded),
        0 if span >= scale.shape[1] else span * first.unit,
        shift=shift,
        shifts=None if shifts is None else _halved(shifts[:, ::span].t().contiguous(), rounded),
        order=first.order,
    )


def _pairs(numbers: Tensor) -> Tensor:
    """(n, groups, 32) 0..15 -> bytes (n, 16 * groups)."""
    low, high = numbers.split(GROUP // 2, dim=-1)
    return (low | (high << 4)).flatten(1).contiguous()


def _zeros_or_minimums(scale: Tensor, minimum: Tensor) -> tuple[int, Tensor]:
    """Zeros, a byte each, where they give every minimum back exactly: formats store them, and 16
    bits have no room for their products with scales."""
    zeros = (minimum / torch.where(scale == 0, 1.0, scale)).round().clamp(-128, 127)
    if torch.equal(zeros * scale, minimum):
        return ZEROS, zeros.to(torch.int8)
    return MINIMUMS, minimum


def _span(parts: list[Tensor]) -> int:
    """Units in a row that have one scale: all, or the largest power of two that holds for all."""
    groups = parts[0].shape[1]
    if all(bool((part == part[:, :1]).all()) for part in parts):
        return groups
    span = 1
    while all(_repeats(part, 2 * span) for part in parts):
        span *= 2
    return span


def _repeats(part: Tensor, span: int) -> bool:
    firsts = part[:, ::span].repeat_interleave(span, 1)[:, : part.shape[1]]
    return torch.equal(part, firsts)


def _halved(values: Tensor, rounded: bool) -> Tensor:
    """In 16 bits where that loses nothing, or is asked for."""
    if rounded and values.is_floating_point():
        return values.half()
    for dtype in (torch.float16, torch.bfloat16):
        short = values.to(dtype)
        if values.dtype == torch.float32 and torch.equal(short.float(), values):
            return short
    return values
