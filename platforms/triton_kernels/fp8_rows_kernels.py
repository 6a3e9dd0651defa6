"""Rotation of neighbouring pairs and rounding to eight-bit floats in one program per head.

Codes are made of the numbers' bits, so one source serves both formats on every target, and the
interpreter: a device's own conversion exists for one of them at most.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def turned(
    row_ptr, column, there, cos_ptr, sin_ptr, DIM: tl.constexpr, ROTARY: tl.constexpr,
    BACK: tl.constexpr, weight_ptr, root, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """A row's channels (BLOCK,) float32, times `root` and a weight, the last ROTARY of them turned
    with their partners, which are read again."""
    REST: tl.constexpr = DIM - ROTARY
    pair = column - REST
    rotates = there & (pair >= 0)
    partner = REST + (pair ^ 1)
    own = tl.load(row_ptr + column, mask=there, other=0.0).to(tl.float32) * root
    other = tl.load(row_ptr + partner, mask=rotates, other=0.0).to(tl.float32) * root
    if WEIGHTED:
        own *= tl.load(weight_ptr + column, mask=there, other=0.0).to(tl.float32)
        other *= tl.load(weight_ptr + partner, mask=rotates, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + pair // 2, mask=rotates, other=1.0)
    sin = tl.load(sin_ptr + pair // 2, mask=rotates, other=0.0)
    sign = tl.where(pair % 2 == 0, -1.0, 1.0)
    if BACK:
        sign = -sign
    return tl.where(rotates, own * cos + sign * other * sin, own)


@triton.jit
def root_of(row_ptr, column, there, eps, DIM: tl.constexpr):
    x = tl.load(row_ptr + column, mask=there, other=0.0).to(tl.float32)
    return tl.rsqrt(tl.sum(x * x, axis=0) / DIM + eps)


@triton.jit
def e4m3(value, BIAS: tl.constexpr):
    """float32 within the format's range -> codes, ties to even, zero without a sign."""
    SHIFT: tl.constexpr = 23 - 3
    LEAST: tl.constexpr = 2.0 ** (1 - BIAS)  # of the numbers with an exponent of their own
    ANCHOR: tl.constexpr = 2.0 ** (23 - (BIAS + 2))  # adding it rounds to the least step
    size = tl.abs(value)
    bits = size.to(tl.int32, bitcast=True)
    even = bits + ((1 << (SHIFT - 1)) - 1) + ((bits >> SHIFT) & 1)
    normal = (even >> SHIFT) - ((127 - BIAS) << 3)
    small = (size + ANCHOR).to(tl.int32, bitcast=True) & 0xFF
    code = tl.where(size >= LEAST, normal, small)
    return tl.where((value < 0) & (code != 0), code | 0x80, code)


@triton.jit
def store_blocks(
    value, codes_ptr, scales_ptr, count, MOST: tl.constexpr, BIAS: tl.constexpr,
    POWER: tl.constexpr, LEAST_MAGNITUDE: tl.constexpr, QUANT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first `count` of `value` (BLOCK,), in blocks of QUANT."""
    block = tl.arange(0, BLOCK // QUANT)
    parts = tl.reshape(value, (BLOCK // QUANT, QUANT))
    largest = tl.maximum(tl.max(tl.abs(parts), axis=1), LEAST_MAGNITUDE)
    scale = tl.div_rn(largest, tl.full(largest.shape, MOST, tl.float32))
    if POWER:
        up = scale.to(tl.int32, bitcast=True) + 0x7FFFFF
        scale = (up & 0x7F800000).to(tl.float32, bitcast=True)
    shares = tl.div_rn(parts, tl.broadcast_to(scale[:, None], parts.shape))
    kept = tl.minimum(tl.maximum(shares, -MOST), MOST)
    column = block[:, None] * QUANT + tl.arange(0, QUANT)[None, :]
    tl.store(codes_ptr + column, e4m3(kept, BIAS).to(tl.uint8), mask=column < count)
    tl.store(scales_ptr + block, scale, mask=block * QUANT < count)


@triton.jit
def inverse_rope_quant_kernel(
    x_ptr, cos_ptr, sin_ptr, codes_ptr, scales_ptr, heads, token_stride, head_stride,
    DIM: tl.constexpr, ROTARY: tl.constexpr, QUANT: tl.constexpr, BLOCK: tl.constexpr,
    POWER: tl.constexpr, MOST: tl.constexpr, BIAS: tl.constexpr, LEAST_MAGNITUDE: tl.constexpr,
):  # fmt: skip
    """One head of one token."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    there = column < DIM
    angle = token * (ROTARY // 2)
    value = turned(
        x_ptr + token * token_stride + head * head_stride, column, there, cos_ptr + angle,
        sin_ptr + angle, DIM, ROTARY, True, cos_ptr, 1.0, False,
    )  # fmt: skip
    place = token * heads + head
    store_blocks(
        value, codes_ptr + place * DIM, scales_ptr + place * (DIM // QUANT), DIM, MOST, BIAS,
        POWER, LEAST_MAGNITUDE, QUANT, BLOCK,
    )  # fmt: skip


@triton.jit
def qk_norm_rope_quant_kernel(
    q_ptr, kv_ptr, weight_ptr, cos_ptr, sin_ptr, out_ptr, codes_ptr, scales_ptr, tail_ptr,
    heads, eps, token_stride, head_stride, kv_stride,
    DIM: tl.constexpr, ROTARY: tl.constexpr, QUANT: tl.constexpr, BLOCK: tl.constexpr,
    POWER: tl.constexpr, MOST: tl.constexpr, BIAS: tl.constexpr, LEAST_MAGNITUDE: tl.constexpr,
):  # fmt: skip
    """One head of one token's queries, or behind the last its key."""
    REST: tl.constexpr = DIM - ROTARY
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    there = column < DIM
    cos_ptr += token * (ROTARY // 2)
    sin_ptr += token * (ROTARY // 2)
    if head < heads:
        row_ptr = q_ptr + token * token_stride + head * head_stride
        root = root_of(row_ptr, column, there, eps, DIM)
        value = turned(
            row_ptr, column, there, cos_ptr, sin_ptr, DIM, ROTARY, False, weight_ptr, root, False
        )
        out_ptr += (token * heads + head) * DIM
        tl.store(out_ptr + column, value.to(out_ptr.dtype.element_ty), mask=there)
    else:
        kv_ptr += token * kv_stride
        root = root_of(kv_ptr, column, there, eps, DIM)
        key = turned(
            kv_ptr, column, there, cos_ptr, sin_ptr, DIM, ROTARY, False, weight_ptr, root, True
        )
        store_blocks(
            key, codes_ptr + token * REST, scales_ptr + token * (REST // QUANT), REST, MOST, BIAS,
            POWER, LEAST_MAGNITUDE, QUANT, BLOCK,
        )  # fmt: skip
        tail_ptr += token * ROTARY - REST
        last = there & (column >= REST)
        tl.store(tail_ptr + column, key.to(tail_ptr.dtype.element_ty), mask=last)
