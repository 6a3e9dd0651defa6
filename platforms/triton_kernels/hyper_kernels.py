"""Hyper-connections in two launches: new streams with partial products, by slices of the width;
then what a token makes of its sums. Between the two lies the one sum that needs all slices.

In the second every lane of a program does both the Sinkhorn steps and the weighted sum, so no
barrier ever stands between lanes of one wavefront.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def new_stream(
    made, streams_ptr, post_ptr, mixing_ptr, row, at, mask, width, J: tl.constexpr, N: tl.constexpr
):
    """Stream J of `mhc_post` (TOKENS, BLOCK), rounded to the streams' dtype, float32."""
    total = tl.zeros(at.shape, tl.float32)
    for i in tl.static_range(N):
        x = tl.load(streams_ptr + at + i * width, mask=mask, other=0.0).to(tl.float32)
        total += tl.load(mixing_ptr + (row * N + i) * N + J) * x
    total += tl.load(post_ptr + row * N + J) * made
    return total.to(streams_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def streams_kernel(
    made_ptr,
    streams_ptr,
    post_ptr,
    mixing_ptr,
    fn_ptr,
    out_ptr,
    partial_ptr,
    squares_ptr,
    tokens,
    width,
    made_stride,
    slice_width,
    POST: tl.constexpr,
    OUTPUTS: tl.constexpr,
    N: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """TOKENS tokens, BLOCK_O outputs, one slice. POST: streams are made first, and those of output
    0 leave them; else they are read. OUTPUTS 0: no products."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    here = (token < tokens)[:, None]
    row = tl.minimum(token, tokens - 1).to(tl.int64)[:, None]
    output = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    begin = tl.program_id(2) * slice_width
    products = tl.zeros((TOKENS, BLOCK_O), tl.float32)
    squares = tl.zeros((TOKENS,), tl.float32)
    for start in range(begin, tl.minimum(begin + slice_width, width), BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = here & (column < width)[None, :]
        at = row * N * width + column[None, :]
        made = tl.zeros((TOKENS, BLOCK), tl.float32)
        if POST:
            from_row = made_ptr + row * made_stride
            made = tl.load(from_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
        for j in tl.static_range(N):
            if POST:
                stream = new_stream(
                    made, streams_ptr, post_ptr, mixing_ptr, row, at, inside, width, j, N
                )
                kept = inside & (tl.program_id(1) == 0)
                value = stream.to(out_ptr.dtype.element_ty)
                tl.store(out_ptr + at + j * width, value, mask=kept)
            else:
                stream = tl.load(streams_ptr + at + j * width, mask=inside, other=0.0)
                stream = stream.to(tl.float32)
            if OUTPUTS:
                squares += tl.sum(stream * stream, axis=1)
                place = output.to(tl.int64)[:, None] * (N * width) + (j * width + column)[None, :]
                mask = (output < OUTPUTS)[:, None] & (column < width)[None, :]
                fn = tl.load(fn_ptr + place, mask=mask, other=0.0)
                if TOKENS >= 16:
                    products = tl.dot(stream, tl.trans(fn), products, input_precision="ieee")
                else:
                    products += tl.sum(stream[:, None, :] * fn[None, :, :], axis=2)
    if OUTPUTS:
        place = tl.program_id(2) * tokens + row
        mask = here & (output < OUTPUTS)[None, :]
        tl.store(partial_ptr + place * OUTPUTS + output[None, :], products, mask=mask)
        first = here & (tl.program_id(1) == 0)
        tl.store(squares_ptr + place, squares[:, None], mask=first)


@triton.jit
def summed(partial_ptr, base_ptr, scale, place, index):
    """Products `index` (…) of a token over its slices at `place` (S, 1…), scaled and shifted."""
    total = tl.sum(tl.load(partial_ptr + place + index[None]), axis=0)
    return total * scale + tl.load(base_ptr + index)


@triton.jit
def sinkhorn(mixing, iterations, eps):
    """(N, N) of positive numbers: columns, then iterations - 1 times rows and columns."""
    mixing = mixing / (tl.sum(mixing, axis=0, keep_dims=True) + eps)
    for _ in range(iterations - 1):
        mixing = mixing / (tl.sum(mixing, axis=1, keep_dims=True) + eps)
        mixing = mixing / (tl.sum(mixing, axis=0, keep_dims=True) + eps)
    return mixing


@triton.jit
def finish_kernel(
    streams_ptr,
    partial_ptr,
    squares_ptr,
    base_ptr,
    scale_ptr,
    weight_ptr,
    out_ptr,
    post_ptr,
    mixing_ptr,
    tokens,
    width,
    iterations,
    eps,
    norm_eps,
    HEAD: tl.constexpr,
    NORM: tl.constexpr,
    N: tl.constexpr,
    SPLITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One token: its weights, the sum of its streams, and its norm. HEAD: weights alone."""
    OUTPUTS: tl.constexpr = N if HEAD else (2 + N) * N
    token = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, SPLITS) * tokens + token
    squares = tl.sum(tl.load(squares_ptr + part), axis=0)
    root = tl.rsqrt(squares / (N * width) + norm_eps)
    n = tl.arange(0, N)
    place = part[:, None] * OUTPUTS
    pre = summed(partial_ptr, base_ptr, root * tl.load(scale_ptr), place, n)
    pre = tl.sigmoid(pre) + eps
    if not HEAD:
        post = summed(partial_ptr, base_ptr, root * tl.load(scale_ptr + 1), place, N + n)
        tl.store(post_ptr + token * N + n, 2.0 * tl.sigmoid(post))
        square = 2 * N + n[:, None] * N + n[None, :]
        scale = root * tl.load(scale_ptr + 2)
        mixing = summed(partial_ptr, base_ptr, scale, place[:, :, None], square)
        mixing = tl.exp(mixing - tl.max(mixing, axis=1, keep_dims=True))
        mixing = mixing / tl.sum(mixing, axis=1, keep_dims=True) + eps
        mixing = sinkhorn(mixing, iterations, eps)
        tl.store(mixing_ptr + token * N * N + n[:, None] * N + n[None, :], mixing)
    column = tl.arange(0, COLUMNS)
    inside = column < width
    entered = tl.zeros((COLUMNS,), tl.float32)
    for j in tl.static_range(N):
        x = tl.load(streams_ptr + (token * N + j) * width + column, mask=inside, other=0.0)
        entered += tl.sum(tl.where(n == j, pre, 0.0), axis=0) * x.to(tl.float32)
    if NORM:
        entered = entered.to(out_ptr.dtype.element_ty).to(tl.float32)
        square_sum = tl.sum(entered * entered, axis=0)
        weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
        entered = entered * tl.rsqrt(square_sum / width + norm_eps) * weight
    value = entered.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * width + column, value, mask=inside)
