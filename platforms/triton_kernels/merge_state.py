"""Joining two partial results of one attention by their log-sum-exps."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import ceil_div, row_tile
from .tuning import Tuning


@triton.jit
def merge_state_kernel(
    first_ptr,
    first_lse_ptr,
    second_ptr,
    second_lse_ptr,
    out_ptr,
    lse_ptr,
    rows,
    dim,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Rows are heads of tokens. A part that saw nothing is not read, whatever it holds."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    nothing: tl.constexpr = float("-inf")
    one = tl.load(first_lse_ptr + row, mask=row < rows, other=nothing)
    two = tl.load(second_lse_ptr + row, mask=row < rows, other=nothing)
    most = tl.maximum(one, two)
    shift = tl.where(most == nothing, 0.0, most)
    weight_one, weight_two = tl.exp(one - shift), tl.exp(two - shift)
    total = weight_one + weight_two
    share = 1.0 / tl.where(total == 0.0, 1.0, total)
    at = row[:, None] * dim + column[None, :]
    inside = (row < rows)[:, None] & (column < dim)[None, :]
    mask = inside & (one != nothing)[:, None]
    first = tl.load(first_ptr + at, mask=mask, other=0.0).to(tl.float32)
    mask = inside & (two != nothing)[:, None]
    second = tl.load(second_ptr + at, mask=mask, other=0.0).to(tl.float32)
    out = first * (weight_one * share)[:, None] + second * (weight_two * share)[:, None]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)
    lse = tl.where(total == 0.0, nothing, most + tl.log(tl.where(total == 0.0, 1.0, total)))
    tl.store(lse_ptr + row, lse, mask=row < rows)


def merge_state(
    tuning: Tuning, first: Tensor, first_lse: Tensor, second: Tensor, second_lse: Tensor
) -> tuple[Tensor, Tensor]:
    tokens, heads, dim = first.shape
    out = torch.empty(first.shape, dtype=first.dtype, device=first.device)
    lse = torch.empty((tokens, heads), dtype=torch.float32, device=first.device)
    rows = tokens * heads
    tile = row_tile(tuning, rows, dim)
    if rows:
        merge_state_kernel[(ceil_div(rows, tile[0]),)](
            first.contiguous(),
            first_lse.contiguous(),
            second.contiguous(),
            second_lse.contiguous(),
            out,
            lse,
            rows,
            dim,
            ROWS=tile[0],
            COLUMNS=tile[1],
            num_warps=tuning.warps(tile[0] * tile[1]),
        )
    return out, lse
