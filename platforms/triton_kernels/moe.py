"""Mixture of experts without a look from the host: rows are sorted by expert on the device, and
each program of a grouped product finds by itself which expert's rows are its own.

The grid is as large as any routing can need: one tile of rows more per expert. A row's result is
summed over its experts in their order of choice, so that it is the same in every batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import ceil_div, rows_of
from .tuning import Tuning, power_of_two


@triton.jit
def route_kernel(
    logits_ptr,
    ids_ptr,
    factors_ptr,
    experts,
    logits_stride,
    TOP_K: tl.constexpr,
    RENORMALISE: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Softmax over all experts; the TOP_K largest, the lowest id among equals."""
    row = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, EXPERTS)
    there = expert < experts
    logit = tl.load(logits_ptr + row * logits_stride + expert, mask=there, other=float("-inf"))
    logit = logit.to(tl.float32)
    weight = tl.exp(logit - tl.max(logit, axis=0))
    total = tl.sum(weight, axis=0)
    if RENORMALISE:
        total = 0.0
    left = logit
    taken = tl.full((EXPERTS,), TOP_K, tl.int32)
    for place in tl.static_range(TOP_K):
        free = there & (taken == TOP_K)
        most = tl.max(tl.where(free, left, float("-inf")), axis=0)
        chosen = tl.min(tl.where(free & (left == most), expert, EXPERTS), axis=0)
        taken = tl.where(expert == chosen, place, taken)
    picked = there & (taken < TOP_K)
    if RENORMALISE:
        total = tl.sum(tl.where(picked, weight, 0.0), axis=0)
    at = row * TOP_K + taken
    tl.store(ids_ptr + at, expert, mask=picked)
    tl.store(factors_ptr + at, weight / total, mask=picked)


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
def expert_kernel(
    x_ptr,
    weight_ptr,
    order_ptr,
    starts_ptr,
    out_ptr,
    experts,
    n,
    k,
    x_stride,
    TOP_K: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """GATED: x (T, k) and weight (E, 2n, k) -> silu(gate) * up (T * TOP_K, n), sorted by expert.
    Otherwise x sorted (T * TOP_K, k) and weight (E, n, k) -> (T * TOP_K, n), in the order of
    choice. `order` says of each sorted row which choice it is."""
    expert, first, end = find_block(starts_ptr, experts, tl.program_id(0), BLOCK_M, EXPERTS)
    if expert == EXPERTS:
        return
    row = first + tl.arange(0, BLOCK_M)
    live = row < end
    choice = tl.load(order_ptr + row, mask=live, other=0)
    source = row.to(tl.int64)
    target = choice.to(tl.int64)
    if GATED:
        source = (choice // TOP_K).to(tl.int64)
        target = row.to(tl.int64)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    x_at = x_ptr + source[:, None] * x_stride + depth[None, :]
    matrices = 2 if GATED else 1
    w_at = weight_ptr + expert.to(tl.int64) * matrices * n * k
    w_at += column.to(tl.int64)[None, :] * k + depth[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        deep = start + depth < k
        x = tl.load(x_at + start, mask=live[:, None] & deep[None, :], other=0.0)
        inside = deep[:, None] & (column < n)[None, :]
        w = tl.load(w_at + start, mask=inside, other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        if GATED:
            w = tl.load(w_at + n * k + start, mask=inside, other=0.0)
            up = tl.dot(x, w, up, input_precision="ieee")
    if GATED:
        acc = acc / (1.0 + tl.exp(-acc)) * up
    at = out_ptr + target[:, None] * n + column[None, :]
    out = acc.to(out_ptr.dtype.element_ty)
    tl.store(at, out, mask=live[:, None] & (column < n)[None, :])


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


def moe(
    tuning: Tuning,
    x: Tensor,
    router_logits: Tensor,
    gate_up: Tensor,
    down: Tensor,
    top_k: int,
    renormalise: bool,
) -> Tensor:
    x, logits = rows_of(x), rows_of(router_logits)
    rows, width = x.shape
    experts, _, inner = down.shape
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    if not rows:
        return out
    ids, factors = _route(logits, top_k, renormalise)
    # A stable sort keeps the order of rows within an expert, and with it the result of each.
    by_expert, order = torch.sort(ids.view(-1), stable=True)
    bounds = torch.arange(experts + 1, dtype=ids.dtype, device=x.device)
    starts = torch.searchsorted(by_expert, bounds, out_int32=True)
    order = order.int()
    hidden = torch.empty((rows * top_k, inner), dtype=x.dtype, device=x.device)
    _product(tuning, x, gate_up, order, starts, hidden, top_k, True)
    each = torch.empty((rows * top_k, width), dtype=torch.float32, device=x.device)
    _product(tuning, hidden, down, order, starts, each, top_k, False)
    block = min(power_of_two(width), tuning.row_elements)
    combine_kernel[(rows, ceil_div(width, block))](
        each, factors, out, width, TOP_K=top_k, BLOCK=block, num_warps=tuning.warps(block)
    )
    return out


def _route(logits: Tensor, top_k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    rows, experts = logits.shape
    ids = torch.empty((rows, top_k), dtype=torch.int32, device=logits.device)
    factors = torch.empty((rows, top_k), dtype=torch.float32, device=logits.device)
    route_kernel[(rows,)](
        logits,
        ids,
        factors,
        experts,
        logits.stride(0),
        TOP_K=top_k,
        RENORMALISE=renormalise,
        EXPERTS=power_of_two(experts),
        num_warps=1,
    )
    return ids, factors


def _product(
    tuning: Tuning,
    x: Tensor,
    weight: Tensor,
    order: Tensor,
    starts: Tensor,
    out: Tensor,
    top_k: int,
    gated: bool,
) -> None:
    experts, _, depth = weight.shape
    n, tile = out.shape[1], tuning.experts
    blocks = min(ceil_div(len(order), tile.block_m) + experts, len(order))
    expert_kernel[(blocks, ceil_div(n, tile.block_n))](
        x,
        weight,
        order,
        starts,
        out,
        experts,
        n,
        depth,
        x.stride(0),
        TOP_K=top_k,
        GATED=gated,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        EXPERTS=power_of_two(experts),
        **tile.launch,
    )
