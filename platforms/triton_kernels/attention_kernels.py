"""Paged attention with an online softmax (Milakov and Gimelshein 2018; Dao 2023, algorithm 1), and
the merge of partial results over parts of the keys (Dao et al. 2023, "Flash-Decoding").

Logits are in units of log 2. Products take the stored dtype and sum in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import attention_plan as plan

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e30)
"""In place of -inf for a running maximum, so that no difference is NaN."""

FIELDS = tl.constexpr(plan.FIELDS)
TOKEN = tl.constexpr(plan.TOKEN)
COUNT = tl.constexpr(plan.COUNT)
POSITION = tl.constexpr(plan.POSITION)
FIRST = tl.constexpr(plan.FIRST)
END = tl.constexpr(plan.END)
PAGES = tl.constexpr(plan.PAGES)
PARTIAL = tl.constexpr(plan.PARTIAL)


@triton.jit
def part_blocks(first, end, SPLITS: tl.constexpr, LEAST: tl.constexpr, BLOCK_N: tl.constexpr):
    """(blocks of keys in a part, parts that have any) of an item with keys first .. end - 1. They
    follow from the row alone, so that its result does not depend on what is beside it."""
    blocks = tl.cdiv(end, BLOCK_N) - first // BLOCK_N
    each = tl.maximum(tl.cdiv(blocks, SPLITS), LEAST)
    return each, tl.cdiv(blocks, each)


@triton.jit
def finish(best, total, acc, sink):
    """acc (M, D) / total (M,), after a key of logit `sink` and value zero has joined. Rows that saw
    nothing give zero."""
    most = tl.maximum(best, sink)
    kept = tl.exp2(best - most)
    total = total * kept + tl.exp2(sink - most)
    factor = kept / tl.where(total == 0.0, 1.0, total)
    return acc * factor[:, None]


@triton.jit
def load_rows(at, there, column, DIM: tl.constexpr, FULL: tl.constexpr, BLOCK_D: tl.constexpr):
    """(N, BLOCK_D) of DIM columns, zero where there is none: with no more of a mask than is needed,
    for on 64 lanes every element's mask is two scalar registers."""
    if DIM != BLOCK_D:
        return tl.load(at, mask=there[:, None] & (column < DIM)[None, :], other=0.0)
    elif FULL:
        return tl.load(at)
    else:
        return tl.load(at, mask=there[:, None], other=0.0)


@triton.jit
def attend_block(
    q,
    best,
    total,
    acc,
    kv_ptr,
    steps_ptr,
    pages_ptr,
    start,
    first,
    end,
    place,
    scale,
    soft_cap,
    page_stride,
    DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    INT8: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Keys start .. start + BLOCK_N - 1 join; FULL: every query sees them all. Slots that no query
    sees are not read. INT8: a row's step, behind its codes, is a factor of its logit and weight."""
    key = start + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_D)
    if FULL:
        there = tl.full((BLOCK_N,), 1, tl.int1)
        page = tl.load(pages_ptr + key // PAGE_SIZE).to(tl.int64)
    else:
        there = (key >= first) & (key < end)
        page = tl.load(pages_ptr + key // PAGE_SIZE, mask=there, other=0).to(tl.int64)
    ROW: tl.constexpr = DIM + 4 * INT8
    row_at = page * page_stride + key % PAGE_SIZE * ROW
    at = row_at[:, None] + column[None, :]
    k = load_rows(kv_ptr + at, there, column, DIM, FULL, BLOCK_D).to(q.dtype)
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if INT8:
        step_at = steps_ptr + row_at // 4 + DIM // 4
        logits *= tl.load(step_at, mask=there, other=0.0)[None, :]
    if CAPPED:
        # tanh by the logistic function, twice as steep.
        logits = soft_cap * (2.0 * tl.sigmoid(2.0 * logits / soft_cap) - 1.0)
    logits *= LOG2E
    if not FULL:
        seen = there[None, :] & (key[None, :] <= place[:, None])
        if WINDOW:
            seen &= key[None, :] > place[:, None] - WINDOW
        logits = tl.where(seen, logits, float("-inf"))
    most = tl.maximum(best, tl.max(logits, axis=1))
    weights = tl.exp2(logits - most[:, None])
    kept = tl.exp2(best - most)
    total = total * kept + tl.sum(weights, axis=1)
    v = load_rows(kv_ptr + PAGE_SIZE * ROW + at, there, column, DIM, FULL, BLOCK_D).to(q.dtype)
    if INT8:
        weights *= tl.load(step_at + PAGE_SIZE * ROW // 4, mask=there, other=0.0)[None, :]
    acc = tl.dot(weights.to(v.dtype), v, acc * kept[:, None], input_precision="ieee")
    return most, total, acc


@triton.jit
def attention_kernel(
    q_ptr,
    kv_ptr,
    steps_ptr,
    out_ptr,
    partial_ptr,
    stats_ptr,
    sinks_ptr,
    items_ptr,
    pages_ptr,
    scale,
    soft_cap,
    q_token_stride,
    q_head_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    INT8: tl.constexpr,
    SINKS: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One item, one kv head, one part of the keys. Row m of a tile is query m // GROUP and head
    m % GROUP of those that share the kv head, so that keys and values are read once for all.
    `steps_ptr`: the same memory as float32, for INT8."""
    item = items_ptr + tl.program_id(0) * FIELDS
    count = tl.load(item + COUNT)
    first, end = tl.load(item + FIRST), tl.load(item + END)
    part = tl.program_id(2)
    each, parts = part_blocks(first, end, SPLITS, LEAST, BLOCK_N)
    if (count == 0) | (part > tl.maximum(parts - 1, 0)):
        return
    GROUP: tl.constexpr = HEADS // KV_HEADS
    kv_head = tl.program_id(1)
    row = tl.arange(0, BLOCK_M)
    query, head = row // GROUP, kv_head * GROUP + row % GROUP
    column = tl.arange(0, BLOCK_D)
    live = (query < count)[:, None] & (column < DIM)[None, :]
    token = tl.load(item + TOKEN).to(tl.int64) + query
    at = token * q_token_stride + head * q_head_stride
    q = tl.load(q_ptr + at[:, None] + column[None, :], mask=live, other=0.0)
    place = tl.load(item + POSITION) + query
    best = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    begin = (first // BLOCK_N + part * each) * BLOCK_N
    ROW: tl.constexpr = DIM + 4 * INT8
    page_stride = KV_HEADS * 2 * PAGE_SIZE * ROW
    kv_ptr += kv_head * 2 * PAGE_SIZE * ROW
    steps_ptr += kv_head * 2 * PAGE_SIZE * ROW // 4
    pages_ptr += tl.load(item + PAGES)
    stop = tl.minimum(end, begin + each * BLOCK_N)
    if not WINDOW:
        full = tl.minimum(stop, (tl.load(item + POSITION) + 1) // BLOCK_N * BLOCK_N)
        for start in range(begin, full, BLOCK_N):
            best, total, acc = attend_block(
                q, best, total, acc, kv_ptr, steps_ptr, pages_ptr, start, first, end, place, scale,
                soft_cap, page_stride, DIM, PAGE_SIZE, WINDOW, CAPPED, INT8, True, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        begin = tl.maximum(begin, full)
    for start in range(begin, stop, BLOCK_N):
        best, total, acc = attend_block(
            q, best, total, acc, kv_ptr, steps_ptr, pages_ptr, start, first, end, place, scale,
            soft_cap, page_stride, DIM, PAGE_SIZE, WINDOW, CAPPED, INT8, False, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    if (SPLITS == 1) | (parts <= 1):
        sink = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        if SINKS:
            sink = tl.load(sinks_ptr + head, mask=query < count, other=0.0) * LOG2E
        out = finish(best, total, acc, sink).to(out_ptr.dtype.element_ty)
        at = (token * HEADS + head) * DIM
        tl.store(out_ptr + at[:, None] + column[None, :], out, mask=live)
    else:
        token = tl.load(item + PARTIAL).to(tl.int64) + query
        at = (token * HEADS + head) * SPLITS + part
        tl.store(partial_ptr + at[:, None] * DIM + column[None, :], acc, mask=live)
        tl.store(stats_ptr + at * 2, best, mask=query < count)
        tl.store(stats_ptr + at * 2 + 1, total, mask=query < count)


@triton.jit
def merge_kernel(
    out_ptr,
    partial_ptr,
    stats_ptr,
    sinks_ptr,
    items_ptr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    SINKS: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The parts of one narrow item and one head become its result."""
    item = items_ptr + tl.program_id(0) * FIELDS
    _, parts = part_blocks(tl.load(item + FIRST), tl.load(item + END), SPLITS, LEAST, BLOCK_N)
    if parts <= 1:
        return
    head = tl.program_id(1)
    part, column = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    for query in range(tl.load(item + COUNT)):
        token = tl.load(item + PARTIAL).to(tl.int64) + query
        at = (token * HEADS + head) * SPLITS + part
        best = tl.load(stats_ptr + at * 2, mask=part < parts, other=LOWEST)
        total = tl.load(stats_ptr + at * 2 + 1, mask=part < parts, other=0.0)
        inside = (part < parts)[:, None] & (column < DIM)[None, :]
        acc = tl.load(partial_ptr + at[:, None] * DIM + column[None, :], mask=inside, other=0.0)
        most = tl.max(best, axis=0)
        if SINKS:
            sink = tl.load(sinks_ptr + head) * LOG2E
            most = tl.maximum(most, sink)
        kept = tl.exp2(best - most)
        denominator = tl.sum(total * kept, axis=0)
        if SINKS:
            denominator += tl.exp2(sink - most)
        out = tl.sum(acc * kept[:, None], axis=0) / denominator
        token = tl.load(item + TOKEN).to(tl.int64) + query
        at = (token * HEADS + head) * DIM + column
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=column < DIM)
