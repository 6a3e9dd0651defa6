"""Gated activations and the embedding lookup."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import ceil_div, rows_of
from .linear import lookup
from .packed_matrix import PackedMatrix
from .tuning import Tuning, power_of_two


@triton.jit
def clamped(gate, up, limit, slope, offset, AFTER: tl.constexpr):
    """Of `clamped_swiglu`. Comparisons, for a minimum would take the limit in place of NaN."""
    if not AFTER:
        gate = tl.where(gate > limit, limit, gate)
    up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    opened = gate / (1.0 + tl.exp(-slope * gate))
    if AFTER:
        opened = tl.where(opened > limit, limit, opened)
    return (up + offset) * opened


@triton.jit
def gate_kernel(
    gate_ptr,
    up_ptr,
    out_ptr,
    width,
    gate_stride,
    up_stride,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    inner = gate
    if GELU:
        # (1 + tanh(u)) / 2 is the logistic function of 2u.
        inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    out = gate / (1.0 + tl.exp(-inner)) * up
    tl.store(out_ptr + row * width + column, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def clamped_kernel(
    gate_ptr, up_ptr, out_ptr, width, gate_stride, up_stride, limit, slope, offset,
    AFTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    out = clamped(gate, up, limit, slope, offset, AFTER)
    tl.store(out_ptr + row * width + column, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def embedding_kernel(
    ids_ptr, table_ptr, out_ptr, width, table_stride, scale, SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    token = tl.load(ids_ptr + row).to(tl.int64)
    value = tl.load(table_ptr + token * table_stride + column, mask=inside)
    if SCALED:
        value = (value.to(tl.float32) * scale).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * width + column, value, mask=inside)


def silu_mul(tuning: Tuning, gate: Tensor, up: Tensor) -> Tensor:
    return _gate(tuning, gate_kernel, gate, up, GELU=False)


def gelu_tanh_mul(tuning: Tuning, gate: Tensor, up: Tensor) -> Tensor:
    return _gate(tuning, gate_kernel, gate, up, GELU=True)


def clamped_swiglu(
    tuning: Tuning,
    gate: Tensor,
    up: Tensor,
    limit: float,
    slope: float,
    offset: float,
    clamp_after: bool = False,
) -> Tensor:
    form = {"limit": limit, "slope": slope, "offset": offset}
    return _gate(tuning, clamped_kernel, gate, up, **form, AFTER=clamp_after)


def _gate(tuning: Tuning, kernel: Any, gate: Tensor, up: Tensor, **form: float) -> Tensor:
    gate, up = rows_of(gate), rows_of(up)
    rows, width = gate.shape
    out = torch.empty((rows, width), dtype=gate.dtype, device=gate.device)
    block = min(power_of_two(width), tuning.row_elements)
    if rows:
        kernel[(rows, ceil_div(width, block))](
            gate,
            up,
            out,
            width,
            gate.stride(0),
            up.stride(0),
            **form,
            BLOCK=block,
            num_warps=tuning.warps(block),
        )
    return out


def embedding(
    tuning: Tuning, ids: Tensor, table: Tensor | PackedMatrix, scale: float = 1.0
) -> Tensor:
    if isinstance(table, PackedMatrix):
        return lookup(tuning, ids, table, scale)
    width = table.shape[1]
    out = torch.empty((len(ids), width), dtype=table.dtype, device=table.device)
    block = min(power_of_two(width), tuning.row_elements)
    if len(ids):
        embedding_kernel[(len(ids), ceil_div(width, block))](
            ids.contiguous(),
            table,
            out,
            width,
            table.stride(0),
            scale,
            SCALED=scale != 1.0,
            BLOCK=block,
            num_warps=tuning.warps(block),
        )
    return out
