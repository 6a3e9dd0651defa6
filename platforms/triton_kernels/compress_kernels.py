"""Compressing tokens into cache entries: pooling by a softmax of each channel on its own, norm,
rotation and store in one program, with the ring of projections that open windows need.

Pooling is in one pass with a running maximum, as attention is. Tokens of the step are read from
their projections, earlier ones from the ring, in two loops: masked loads of both would cost both.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_kernels import LOWEST
from .vector_kernels import row_of


@triton.jit
def pool_places(key, score, there, best, total, acc):
    """Places (P,) of channels (C,) join a softmax; keys and scores (P, C)."""
    score = tl.where(there, score, float("-inf"))
    most = tl.maximum(best, tl.max(score, axis=0))
    weights = tl.exp(score - most[None, :])
    kept = tl.exp(best - most)
    total = total * kept + tl.sum(weights, axis=0)
    return most, total, acc * kept + tl.sum(weights * key, axis=0)


@triton.jit
def pooled(
    projected_ptr,
    state_ptr,
    ape_ptr,
    token,
    slot,
    position,
    context,
    column,
    inside,
    projected_stride,
    slot_stride,
    DIM: tl.constexpr,
    RATIO: tl.constexpr,
    PARTS: tl.constexpr,
    RING: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Channels `column` (BLOCK_C,) of the entry that a row's token at `position` completes."""
    WIDTH: tl.constexpr = PARTS * DIM
    PLACES: tl.constexpr = PARTS * RATIO
    first = position - PLACES + 1
    old = tl.minimum(tl.maximum(context - first, 0), PLACES)
    best = tl.full((BLOCK_C,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_C,), tl.float32)
    acc = tl.zeros((BLOCK_C,), tl.float32)
    state_ptr += slot * slot_stride
    projected_ptr += (token - PLACES + 1) * projected_stride
    for start in range(0, old, BLOCK_P):
        place = start + tl.arange(0, BLOCK_P)
        there = ((place < old) & (first + place >= 0))[:, None] & inside[None, :]
        at = (place // RATIO * DIM)[:, None] + column[None, :]
        bias = tl.load(
            ape_ptr + ((first + PLACES + place) % RATIO * WIDTH)[:, None] + at,
            mask=there,
            other=0.0,
        )
        ring = ((first + place + RING * PLACES) % RING)[:, None] * (2 * WIDTH) + at
        key = tl.load(state_ptr + ring, mask=there, other=0.0)
        score = tl.load(state_ptr + ring + WIDTH, mask=there, other=0.0) + bias
        best, total, acc = pool_places(key, score, there, best, total, acc)
    for start in range(old, PLACES, BLOCK_P):
        place = start + tl.arange(0, BLOCK_P)
        there = ((place < PLACES) & (first + place >= 0))[:, None] & inside[None, :]
        at = (place // RATIO * DIM)[:, None] + column[None, :]
        bias = tl.load(
            ape_ptr + ((first + PLACES + place) % RATIO * WIDTH)[:, None] + at,
            mask=there,
            other=0.0,
        )
        row = place.to(tl.int64)[:, None] * projected_stride + at
        key = tl.load(projected_ptr + row, mask=there, other=0.0).to(tl.float32)
        score = tl.load(projected_ptr + row + WIDTH, mask=there, other=0.0).to(tl.float32) + bias
        best, total, acc = pool_places(key, score, there, best, total, acc)
    return tl.where(inside, acc / tl.where(total == 0.0, 1.0, total), 0.0)


@triton.jit
def make_entry(
    projected_ptr, state_ptr, ape_ptr, weight_ptr, cos_ptr, sin_ptr, cache_ptr, table_ptr,
    token, slot, position, context, eps, projected_stride, slot_stride,
    DIM: tl.constexpr, ROTARY: tl.constexpr, RATIO: tl.constexpr, PARTS: tl.constexpr,
    RING: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Channels in three parts: those that are not turned, and both of every turned pair."""
    REST: tl.constexpr = DIM - ROTARY
    column, pair = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_R)
    plain, turned = column < REST, pair < ROTARY // 2
    even = REST + 2 * pair
    rest = pooled(
        projected_ptr, state_ptr, ape_ptr, token, slot, position, context, column, plain,
        projected_stride, slot_stride, DIM, RATIO, PARTS, RING, BLOCK_P, BLOCK_C,
    )  # fmt: skip
    one = pooled(
        projected_ptr, state_ptr, ape_ptr, token, slot, position, context, even, turned,
        projected_stride, slot_stride, DIM, RATIO, PARTS, RING, BLOCK_P, BLOCK_R,
    )  # fmt: skip
    two = pooled(
        projected_ptr, state_ptr, ape_ptr, token, slot, position, context, even + 1, turned,
        projected_stride, slot_stride, DIM, RATIO, PARTS, RING, BLOCK_P, BLOCK_R,
    )  # fmt: skip
    squares = tl.sum(rest * rest, axis=0) + tl.sum(one * one + two * two, axis=0)
    root = tl.rsqrt(squares / DIM + eps)
    rest *= root * tl.load(weight_ptr + column, mask=plain, other=0.0)
    one *= root * tl.load(weight_ptr + even, mask=turned, other=0.0)
    two *= root * tl.load(weight_ptr + even + 1, mask=turned, other=0.0)
    cos = tl.load(cos_ptr + token * (ROTARY // 2) + pair, mask=turned, other=0.0)
    sin = tl.load(sin_ptr + token * (ROTARY // 2) + pair, mask=turned, other=0.0)
    page = tl.load(table_ptr + position // PAGE_SIZE).to(tl.int64)
    place = page * ((PAGE_SIZE + RATIO - 1) // RATIO) + position % PAGE_SIZE // RATIO
    cache_ptr += place * DIM
    kind = cache_ptr.dtype.element_ty
    tl.store(cache_ptr + column, rest.to(kind), mask=plain)
    tl.store(cache_ptr + even, (one * cos - two * sin).to(kind), mask=turned)
    tl.store(cache_ptr + even + 1, (two * cos + one * sin).to(kind), mask=turned)


@triton.jit
def append(
    projected_ptr, state_ptr, token, slot, position, projected_stride, slot_stride,
    WIDTH: tl.constexpr, RING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A token's projection, as it is, into its place of the ring."""
    state_ptr += slot * slot_stride + position % RING * WIDTH
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(projected_ptr + token * projected_stride + column, mask=column < WIDTH)
        tl.store(state_ptr + column, value.to(tl.float32), mask=column < WIDTH)


@triton.jit
def compress_kernel(
    projected_ptr,
    state_ptr,
    ape_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    cache_ptr,
    slots_ptr,
    table_ptr,
    starts_ptr,
    contexts_ptr,
    rows,
    eps,
    projected_stride,
    slot_stride,
    table_stride,
    MAKES: tl.constexpr,
    APPENDS: tl.constexpr,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    RATIO: tl.constexpr,
    PARTS: tl.constexpr,
    RING: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """With MAKES and APPENDS, the tokens of one row in their order: what a token overwrites in the
    ring no later entry needs. With one of them, one token: all entries are made before any token
    is appended, in two launches."""
    if MAKES and APPENDS:
        row = tl.program_id(0)
        first = tl.load(starts_ptr + row)
        count = tl.load(starts_ptr + row + 1) - first
        begin = 0
    else:
        row = row_of(tl.program_id(0), starts_ptr, rows, ROWS)
        first = tl.load(starts_ptr + row)
        begin = tl.program_id(0) - first
        count = begin + 1
    slot = tl.load(slots_ptr + row).to(tl.int64)
    context = tl.load(contexts_ptr + row)
    table_ptr += row.to(tl.int64) * table_stride
    if slot >= 0:
        for n in range(begin, count):
            token = first.to(tl.int64) + n
            position = context + n
            if MAKES:  # noqa: SIM102 (one is settled when it is compiled)
                if (position + 1) % RATIO == 0:
                    make_entry(
                        projected_ptr, state_ptr, ape_ptr, weight_ptr, cos_ptr, sin_ptr,
                        cache_ptr, table_ptr, token, slot, position, context, eps,
                        projected_stride, slot_stride, DIM, ROTARY, RATIO, PARTS, RING,
                        PAGE_SIZE, BLOCK_P, BLOCK_C, BLOCK_R,
                    )  # fmt: skip
            if MAKES and APPENDS:
                tl.debug_barrier()
            if APPENDS:
                kept = True
                if not MAKES:
                    kept = first + n >= tl.load(starts_ptr + row + 1) - RING
                if kept:
                    append(
                        projected_ptr, state_ptr, token, slot, position, projected_stride,
                        slot_stride, 2 * PARTS * DIM, RING, BLOCK_C,
                    )  # fmt: skip
