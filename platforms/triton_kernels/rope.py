"""Rotary embedding of queries and keys in one launch, with their head norms where a model has them.

A program turns some heads of one token: of the queries, or of the keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import ceil_div, heads_of
from .tuning import Tuning, at_most, power_of_two


@triton.jit
def _turn(
    x_ptr,
    out_ptr,
    weight_ptr,
    cos,
    sin,
    token,
    token_stride,
    head_stride,
    block,
    heads,
    eps,
    NORM: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Heads block * HEADS .. of one token."""
    head = block * HEADS + tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, BLOCK_HALF)[None, :]
    pair = (head < heads) & (column < HALF)
    source = x_ptr + token * token_stride + head * head_stride
    target = out_ptr + (token * heads + head) * DIM
    first = tl.load(source + column, mask=pair, other=0.0).to(tl.float32)
    second = tl.load(source + HALF + column, mask=pair, other=0.0).to(tl.float32)
    kind: tl.constexpr = out_ptr.dtype.element_ty
    if DIM > 2 * HALF:
        rest_column = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
        beyond = (head < heads) & (rest_column < DIM)
        rest = tl.load(source + rest_column, mask=beyond, other=0.0)
    if NORM:
        squares = tl.sum(first * first + second * second, axis=1, keep_dims=True)
        if DIM > 2 * HALF:
            wide = rest.to(tl.float32)
            squares += tl.sum(wide * wide, axis=1, keep_dims=True)
        scale = tl.rsqrt(squares / DIM + eps)
        there = column < HALF
        first *= scale * tl.load(weight_ptr + column, mask=there, other=0.0).to(tl.float32)
        second *= scale * tl.load(weight_ptr + HALF + column, mask=there, other=0.0).to(tl.float32)
        if DIM > 2 * HALF:
            weight = tl.load(weight_ptr + rest_column, mask=rest_column < DIM, other=0.0)
            rest = wide * scale * weight.to(tl.float32)
    tl.store(target + column, (first * cos - second * sin).to(kind), mask=pair)
    tl.store(target + HALF + column, (second * cos + first * sin).to(kind), mask=pair)
    if DIM > 2 * HALF:
        tl.store(target + rest_column, rest.to(kind), mask=beyond)


@triton.jit
def rope_kernel(
    q_ptr,
    k_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    q_heads,
    k_heads,
    eps,
    NORM: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    HEADS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    column = tl.arange(0, BLOCK_HALF)[None, :]
    cos = tl.load(cos_ptr + token * HALF + column, mask=column < HALF, other=0.0)
    sin = tl.load(sin_ptr + token * HALF + column, mask=column < HALF, other=0.0)
    of_queries = tl.cdiv(q_heads, HEADS)
    if block < of_queries:
        _turn(q_ptr, q_out_ptr, q_weight_ptr, cos, sin, token, q_token_stride, q_head_stride, block,
              q_heads, eps, NORM, DIM, HALF, BLOCK_HALF, BLOCK_REST, HEADS)  # fmt: skip
    else:
        block -= of_queries
        _turn(k_ptr, k_out_ptr, k_weight_ptr, cos, sin, token, k_token_stride, k_head_stride, block,
              k_heads, eps, NORM, DIM, HALF, BLOCK_HALF, BLOCK_REST, HEADS)  # fmt: skip


def rope(tuning: Tuning, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _launch(tuning, q, k, None, cos, sin, 0.0)


def qk_norm_rope(
    tuning: Tuning,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor]:
    return _launch(tuning, q, k, (q_weight, k_weight), cos, sin, eps)


def _launch(
    tuning: Tuning,
    q: Tensor,
    k: Tensor,
    weights: tuple[Tensor, Tensor] | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    q, k = heads_of(q), heads_of(k)
    outs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k)]
    tokens, heads, dim = q.shape
    half = cos.shape[-1]
    block_half, block_rest = power_of_two(half), power_of_two(dim - 2 * half)
    columns = 2 * block_half + (block_rest if dim > 2 * half else 0)
    block = min(power_of_two(heads), at_most(max(1, tuning.row_elements // columns)))
    if tokens:
        rope_kernel[(tokens, ceil_div(heads, block) + ceil_div(k.shape[1], block))](
            q,
            k,
            *(weights or (cos, cos)),
            cos.contiguous(),
            sin.contiguous(),
            *outs,
            *q.stride()[:2],
            *k.stride()[:2],
            heads,
            k.shape[1],
            eps,
            NORM=weights is not None,
            DIM=dim,
            HALF=half,
            BLOCK_HALF=block_half,
            BLOCK_REST=block_rest,
            HEADS=block,
            num_warps=tuning.warps(block * columns),
        )
    return outs[0], outs[1]
