"""RMS norm, alone and after a residual add, and layer norm: whole rows in one tile."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import ceil_div, row_tile, rows_of
from .tuning import Tuning


@triton.jit
def rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    total_ptr,
    rows,
    width,
    x_stride,
    residual_stride,
    eps,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < width)
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    at = row * width + column
    if ADD:
        from_row = residual_ptr + row * residual_stride
        x += tl.load(from_row + column, mask=inside, other=0.0).to(tl.float32)
        total = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + at, total, mask=inside)
        x = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / width + eps)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (x * scale * weight).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def layer_norm_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, rows, width, x_stride, eps, BIASED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < width)
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    # The mean first: a difference of mean squares would lose all digits of a large mean.
    apart = tl.where(inside, x - tl.sum(x, axis=1, keep_dims=True) / width, 0.0)
    scale = tl.rsqrt(tl.sum(apart * apart, axis=1, keep_dims=True) / width + eps)
    out = apart * scale
    out *= tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    if BIASED:
        out += tl.load(bias_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + column, out.to(out_ptr.dtype.element_ty), mask=inside)


def layer_norm(
    tuning: Tuning, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> Tensor:
    wide = rows_of(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, width = wide.shape
    tile = row_tile(tuning, rows, width)
    if rows:
        layer_norm_kernel[(ceil_div(rows, tile[0]),)](
            wide,
            weight,
            weight if bias is None else bias,
            out,
            rows,
            width,
            wide.stride(0),
            eps,
            BIASED=bias is not None,
            ROWS=tile[0],
            COLUMNS=tile[1],
            num_warps=tuning.warps(tile[0] * tile[1]),
        )
    return out


def rms_norm(tuning: Tuning, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = rows_of(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(tuning, wide, None, weight, out, out, eps)
    return out


def add_rms_norm(
    tuning: Tuning, x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    x, residual = rows_of(x), rows_of(residual)
    out, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    _launch(tuning, x, residual, weight, out, total, eps)
    return out, total


def _launch(
    tuning: Tuning,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    out: Tensor,
    total: Tensor,
    eps: float,
) -> None:
    rows, width = x.shape
    if not rows:
        return
    tile = row_tile(tuning, rows, width)
    other = x if residual is None else residual
    rms_norm_kernel[(ceil_div(rows, tile[0]),)](
        x,
        other,
        weight,
        out,
        total,
        rows,
        width,
        x.stride(0),
        other.stride(0),
        eps,
        ADD=residual is not None,
        ROWS=tile[0],
        COLUMNS=tile[1],
        num_warps=tuning.warps(tile[0] * tile[1]),
    )
