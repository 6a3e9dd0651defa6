"""Quantised matrices as `linear` and `embedding` read them, made once, at load. Imports no Triton.

INT8    bytes (n, k), signed
INT4    bytes (n, k / 2): byte i of 32 columns holds column i low and column 16 + i high
FP8     bytes (n, k), OCP e4m3
MXFP4   as INT4, e2m1

k is padded to 32 but for FP8. Scales are (groups, n), so that neighbours in a row are neighbours in
the output. value = scale * (number - zero), or scale * number - minimum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...common.checkpoint.block_floats import MX_GROUP, SQUARE, Fp8Blocks, Mxfp4Rows
from ...common.checkpoint.quantised_rows import GROUP, QuantisedRows
from ...common.errors import KernelError
from ..interface_kernels import Problem
from ..torch_runtime.device import TorchDevice
from ..torch_runtime.rounding import round_int4, round_int8

INT8, INT4, FP8, MXFP4 = range(4)
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

    @property
    def nbytes(self) -> int:
        parts = (self.data, self.scales, self.shifts, self.order)
        return sum(part.nbytes for part in parts if part is not None)


def pack(weight: Any, problem: Problem, device: TorchDevice) -> Tensor | PackedMatrix:
    """A checkpoint's own numbers rearranged, or a tensor rounded; one without a scheme as it is."""
    dtype = getattr(torch, problem.dtype)
    if isinstance(weight, Fp8Blocks):
        codes, scales = device.to_device(weight.codes), device.to_device(weight.scales.T)
        return PackedMatrix(FP8, weight.shape, dtype, codes, scales, SQUARE, SQUARE)
    if isinstance(weight, Mxfp4Rows):
        codes = device.to_device(weight.codes)
        numbers = torch.stack((codes & 15, codes >> 4), -1).view(len(codes), -1, GROUP)
        scales = device.to_device(weight.scales.T)
        return PackedMatrix(MXFP4, weight.shape, dtype, _pairs(numbers), scales, MX_GROUP)
    if isinstance(weight, QuantisedRows):
        return _pack_rows(weight, problem, dtype, device)
    if not isinstance(weight, Tensor):
        raise KernelError(f"'triton' has no form for {type(weight).__name__}.")
    if problem.weights == "int8":
        return _pack_ints(8, *round_int8(weight), None, weight.shape, dtype)
    if problem.weights == "int4":
        return _pack_ints(4, *round_int4(weight), weight.shape, dtype)
    return weight


def _pack_rows(
    rows: QuantisedRows, problem: Problem, dtype: torch.dtype, device: TorchDevice
) -> PackedMatrix:
    if problem.op == "embedding" and rows.order is not None:
        raise KernelError("An embedding with columns out of order is not served.")
    if rows.scale.shape[1] != rows.q.shape[1]:
        raise KernelError(f"'triton' has no form for scales per {GROUP // 2} columns.")
    q, scale = device.to_device(rows.q), device.to_device(rows.scale)
    minimum = None if rows.minimum is None else device.to_device(rows.minimum)
    order = None if rows.order is None else device.to_device(rows.order)
    return _pack_ints(rows.bits, q, scale, minimum, rows.shape, dtype, order)


def _pack_ints(
    bits: int,
    q: Tensor,
    scale: Tensor,
    minimum: Tensor | None,
    shape: Any,
    dtype: torch.dtype,
    order: Tensor | None = None,
) -> PackedMatrix:
    """q (n, groups, 32) whole numbers of any dtype; scale and minimum (n, groups)."""
    scale = scale.float()
    shift, shifts = PLAIN, None
    if minimum is not None:
        shift, shifts = _zeros_or_minimums(scale, minimum.float())
    span = _span([part for part in (scale, shifts) if part is not None])
    data = _pairs(q.to(torch.uint8)) if bits == 4 else q.to(torch.int8).flatten(1).contiguous()
    n, k = shape
    return PackedMatrix(
        INT4 if bits == 4 else INT8,
        (n, k),
        dtype,
        data,
        _halved(scale[:, ::span].t().contiguous()),
        0 if span >= q.shape[1] else span * GROUP,
        shift=shift,
        shifts=None if shifts is None else _halved(shifts[:, ::span].t().contiguous()),
        order=order,
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
    """Groups in a row that have one scale: all, or the largest power of two that holds for all."""
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


def _halved(values: Tensor) -> Tensor:
    """In 16 bits where that loses nothing."""
    for dtype in (torch.float16, torch.bfloat16):
        short = values.to(dtype)
        if values.dtype == torch.float32 and torch.equal(short.float(), values):
            return short
    return values
