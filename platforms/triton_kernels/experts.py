"""The experts of tokens whose routes are known, without a look from the host: rows are sorted by
expert on the device, and each program of a grouped product finds by itself which expert's rows are
its own.

The grid is as large as any routing can need: one tile of rows more per expert. A row's result is
summed over its experts in their order of choice, so that it is the same in every batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import packed_experts, packed_matrix
from .launch import ceil_div, rows_of
from .linear import packed_sums
from .packed_experts import PackedExperts
from .pointwise import clamped
from .tuning import Tile, Tuning, power_of_two

PLAIN = tl.constexpr(packed_matrix.PLAIN)
UNPACKED = tl.constexpr(packed_experts.UNPACKED)


@triton.jit
def find_block(starts_ptr, experts, block, BLOCK_M: tl.constexpr, EXPERTS: tl.constexpr):
    """(expert, its first row of this tile, the end of its rows); an expert beyond the last where
    the tile is nobody's. `starts` (experts + 1,) is where each expert's rows begin."""
    expert = tl.arange(0, EXPERTS)
    there = expert < experts
    begin = tl.load(starts_ptr + expert, mask=there, other=0)
    end = tl.load(starts_ptr + 1 + expert, mask=there, other=0)
    tiles = tl.cdiv(end - begin, BLOCK_M)
    before = tl.cumsum(tiles, axis=0) - tiles
    mine = there & (before <= block) & (block < before + tiles)
    chosen = tl.min(tl.where(mine, expert, EXPERTS), axis=0)
    first = tl.sum(tl.where(mine, begin + (block - before) * BLOCK_M, 0), axis=0)
    return chosen, first, tl.sum(tl.where(mine, end, 0), axis=0)


@triton.jit
def float_sums(
    x_at,
    live,
    weight_at,
    inside,
    k,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """As `packed_sums`, of a matrix in the dtype of x."""
    depth = tl.arange(0, BLOCK_K)
    x_at = x_at[:, None] + depth[None, :]
    weight_at = weight_at[None, :] + depth[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        deep = start + depth < k
        x = tl.load(x_at + start, mask=live[:, None] & deep[None, :], other=0.0)
        w = tl.load(weight_at + start, mask=deep[:, None] & inside[None, :], other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    return acc


@triton.jit
def matrix_sums(
    x_at,
    live,
    matrix,
    column,
    data_ptr,
    scale_ptr,
    shift_ptr,
    bias_ptr,
    n,
    k,
    width,
    scale_stride,
    shift_stride,
    FORM: tl.constexpr,
    SHIFT: tl.constexpr,
    GROUP: tl.constexpr,
    SQUARES: tl.constexpr,
    PAIRED: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of the product with one matrix (n, k) of a stack, bias included."""
    inside = column < n
    output = matrix.to(tl.int64) * n + column
    data_at = data_ptr + output * width
    if FORM == UNPACKED:
        acc = float_sums(x_at, live, data_at, inside, k, BLOCK_M, BLOCK_N, BLOCK_K)
    else:
        scale_at = scale_ptr + matrix * tl.cdiv(n, SQUARES) + column // SQUARES
        shift_at = scale_at
        if SHIFT != PLAIN:
            shift_at = shift_ptr + output
        acc = packed_sums(
            x_at, live, data_at, scale_at, shift_at, inside, k, width, scale_stride, shift_stride,
            FORM, SHIFT, GROUP, PAIRED, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    if BIASED:
        acc += tl.load(bias_ptr + output, mask=inside, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def expert_kernel(
    x_ptr,
    order_ptr,
    starts_ptr,
    bias_ptr,
    out_ptr,
    data_ptr,
    scale_ptr,
    shift_ptr,
    experts,
    n,
    k,
    x_stride,
    width,
    scale_stride,
    shift_stride,
    limit,
    slope,
    offset,
    TOP_K: tl.constexpr,
    GATED: tl.constexpr,
    CLAMPED: tl.constexpr,
    AFTER: tl.constexpr,
    BIASED: tl.constexpr,
    FORM: tl.constexpr,
    SHIFT: tl.constexpr,
    GROUP: tl.constexpr,
    SQUARES: tl.constexpr,
    PAIRED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """GATED: x (T, k) and matrices (2 E, n, k) -> activation(gate, up) (T * TOP_K, n), sorted by
    expert. Otherwise x sorted (T * TOP_K, k) and matrices (E, n, k) -> (T * TOP_K, n), in the order
    of choice. `order` says of each sorted row which choice it is."""
    expert, first, end = find_block(starts_ptr, experts, tl.program_id(0), BLOCK_M, EXPERTS)
    if expert == EXPERTS:
        return
    row = first + tl.arange(0, BLOCK_M)
    live = row < end
    choice = tl.load(order_ptr + row, mask=live, other=0)
    source, target, matrix = row, choice, expert
    if GATED:
        source, target, matrix = choice // TOP_K, row, 2 * expert
    x_at = x_ptr + source.to(tl.int64) * x_stride
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    out = matrix_sums(
        x_at, live, matrix, column, data_ptr, scale_ptr, shift_ptr, bias_ptr, n, k, width,
        scale_stride, shift_stride, FORM, SHIFT, GROUP, SQUARES, PAIRED, BIASED,
        BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if GATED:
        up = matrix_sums(
            x_at, live, matrix + 1, column, data_ptr, scale_ptr, shift_ptr, bias_ptr, n, k, width,
            scale_stride, shift_stride, FORM, SHIFT, GROUP, SQUARES, PAIRED, BIASED,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if CLAMPED:
            out = clamped(out, up, limit, slope, offset, AFTER)
        else:
            out = out / (1.0 + tl.exp(-out)) * up
    at = out_ptr + target.to(tl.int64)[:, None] * n + column[None, :]
    tl.store(at, out.to(out_ptr.dtype.element_ty), mask=live[:, None] & (column < n)[None, :])


@triton.jit
def combine_kernel(each_ptr, factors_ptr, out_ptr, width, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """A row's results times their factors, summed in the order of choice."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for place in tl.static_range(TOP_K):
        at = row * TOP_K + place
        value = tl.load(each_ptr + at * width + column, mask=column < width, other=0.0)
        total += tl.load(factors_ptr + at) * value
    target = out_ptr + row * width + column
    tl.store(target, total.to(out_ptr.dtype.element_ty), mask=column < width)


@dataclass(frozen=True, slots=True)
class _Sorted:
    """Choices by expert. `order` (T * top_k,): which choice a sorted row is; `starts`
    (experts + 1,): where an expert's rows begin; both int32."""

    order: Tensor
    starts: Tensor
    top_k: int


def moe_experts(
    tuning: Tuning,
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: Tensor | PackedExperts,
    down: Tensor | PackedExperts,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    limit: float = 0.0,
    slope: float = 1.0,
    offset: float = 0.0,
    clamp_after: bool = False,
) -> Tensor:
    x = rows_of(x)
    (rows, width), top_k = x.shape, experts.shape[1]
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    if not rows:
        return out
    each = torch.empty((rows * top_k, width), dtype=torch.float32, device=x.device)
    inner = packed_experts.outputs(gate_up, 2)
    hidden = torch.empty((rows * top_k, inner), dtype=x.dtype, device=x.device)
    chosen = _by_expert(experts, down.count if isinstance(down, PackedExperts) else len(down))
    form = {"limit": limit, "slope": slope, "offset": offset, "AFTER": clamp_after}
    _product(tuning, x, gate_up, gate_up_bias, chosen, hidden, GATED=True, **form)
    _product(tuning, hidden, down, down_bias, chosen, each, GATED=False, **form)
    block = min(power_of_two(width), tuning.row_elements)
    combine_kernel[(rows, ceil_div(width, block))](
        each, weights, out, width, TOP_K=top_k, BLOCK=block, num_warps=tuning.warps(block)
    )
    return out


def _by_expert(experts: Tensor, count: int) -> _Sorted:
    # A stable sort keeps the order of rows within an expert, and with it the result of each.
    by_expert, order = torch.sort(experts.reshape(-1), stable=True)
    bounds = torch.arange(count + 1, dtype=experts.dtype, device=experts.device)
    starts = torch.searchsorted(by_expert, bounds, out_int32=True)
    return _Sorted(order.int(), starts, experts.shape[1])


def _product(
    tuning: Tuning,
    x: Tensor,
    stack: Tensor | PackedExperts,
    bias: Tensor | None,
    chosen: _Sorted,
    out: Tensor,
    GATED: bool,
    **form: Any,
) -> None:
    n, choices = out.shape[1], len(chosen.order)
    experts = len(chosen.starts) - 1
    tile = _tile(tuning, x, choices, experts)
    blocks = min(ceil_div(choices, tile.block_m) + experts, choices)
    expert_kernel[(blocks, ceil_div(n, tile.block_n))](
        x,
        chosen.order,
        chosen.starts,
        bias,
        out,
        *packed_experts.tensors(stack),
        experts,
        n,
        x.shape[1],
        x.stride(0),
        *packed_experts.strides(stack),
        **form,
        TOP_K=chosen.top_k,
        GATED=GATED,
        CLAMPED=form["limit"] > 0,
        BIASED=bias is not None,
        **packed_experts.form(stack, tile.block_k),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        EXPERTS=power_of_two(experts),
        **tile.launch,
    )


def _tile(tuning: Tuning, x: Tensor, choices: int, experts: int) -> Tile:
    """By shapes alone: a tile of many rows where experts have that many on average."""
    if x.dtype == torch.float32:
        return tuning.linear_float32
    many = tuning.experts_many
    return many if choices >= experts * many.block_m else tuning.experts
