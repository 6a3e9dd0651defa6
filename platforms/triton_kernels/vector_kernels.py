"""Attention where one vector is key and value of all heads, over paged vectors: all tokens or a
window of them, and compressed entries beside them, all or selected.

Where tokens lie follows on the device from the rows (`row_of`), so a captured step that is replayed
writes to the slots of its own step. Softmax as in `attention_kernels`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_kernels import LOG2E, LOWEST, finish


@triton.jit
def row_of(token, starts_ptr, rows, ROWS: tl.constexpr):
    """The row that a step's token belongs to; ROWS >= rows."""
    row = tl.arange(0, ROWS)
    ends = tl.load(starts_ptr + 1 + row, mask=row < rows, other=0x7FFFFFFF)
    return tl.sum((ends <= token).to(tl.int32), axis=0)


@triton.jit
def store_kernel(
    vectors_ptr,
    cache_ptr,
    table_ptr,
    starts_ptr,
    contexts_ptr,
    rows,
    vector_stride,
    table_stride,
    PAGE_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One new token's vector into the slot of its position."""
    token = tl.program_id(0)
    row = row_of(token, starts_ptr, rows, ROWS)
    position = tl.load(contexts_ptr + row) + token - tl.load(starts_ptr + row)
    page = tl.load(table_ptr + row.to(tl.int64) * table_stride + position // PAGE_SIZE)
    slot = page.to(tl.int64) * PAGE_SIZE + position % PAGE_SIZE
    column = tl.arange(0, BLOCK)
    at = token.to(tl.int64) * vector_stride + column
    value = tl.load(vectors_ptr + at, mask=column < DIM)
    tl.store(cache_ptr + slot * DIM + column, value, mask=column < DIM)


@triton.jit
def join(
    q,
    q_rest,
    best,
    total,
    acc,
    vector_ptr,
    seen,
    scale,
    DIM: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Vectors at `vector_ptr` (N,) join, where they are `seen` (N,); others are not read."""
    column = tl.arange(0, BLOCK_V)
    mask = seen[:, None] if VALUE == BLOCK_V else seen[:, None] & (column < VALUE)[None, :]
    value = tl.load(vector_ptr[:, None] + column[None, :], mask=mask, other=0.0)
    logits = tl.dot(q, tl.trans(value), input_precision="ieee")
    if DIM > VALUE:
        more = VALUE + tl.arange(0, BLOCK_R)
        mask = seen[:, None] & (more < DIM)[None, :]
        rest = tl.load(vector_ptr[:, None] + more[None, :], mask=mask, other=0.0)
        logits = tl.dot(q_rest, tl.trans(rest), logits, input_precision="ieee")
    logits = tl.where(seen[None, :], logits * (scale * LOG2E), float("-inf"))
    most = tl.maximum(best, tl.max(logits, axis=1))
    weights = tl.exp2(logits - most[:, None])
    kept = tl.exp2(best - most)
    total = total * kept + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(value.dtype), value, acc * kept[:, None], input_precision="ieee")
    return most, total, acc


@triton.jit
def token_parts(
    position,
    WINDOW: tl.constexpr,
    RATIO: tl.constexpr,
    SELECTED: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(first token seen, blocks of tokens, blocks of both, blocks of a part, parts that have any).
    They follow from the position alone, so that a result does not depend on what is beside it."""
    first = tl.maximum(position - WINDOW + 1, 0) if WINDOW else position * 0
    tokens = tl.cdiv(position + 1 - first, BLOCK_N)
    blocks = tokens
    if RATIO:
        entries = (position + 1) // RATIO
        if SELECTED:
            entries = tl.minimum(entries, 1) * SELECTED
        blocks += tl.cdiv(entries, BLOCK_N)
    each = tl.maximum(tl.cdiv(blocks, SPLITS), LEAST)
    return first, tokens, blocks, each, tl.cdiv(blocks, each)


@triton.jit
def vector_attention_kernel(
    q_ptr,
    cache_ptr,
    entries_ptr,
    out_ptr,
    partial_ptr,
    stats_ptr,
    sinks_ptr,
    table_ptr,
    entry_table_ptr,
    selected_ptr,
    starts_ptr,
    contexts_ptr,
    rows,
    scale,
    q_token,
    q_head,
    table_stride,
    entry_table_stride,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    RATIO: tl.constexpr,
    SELECTED: tl.constexpr,
    SINKS: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One query, BLOCK_M heads, one part of what it sees. WINDOW 0: all tokens; RATIO 0: no
    entries; SELECTED 0: all entries, else so many are named."""
    token = tl.program_id(0)
    row = row_of(token, starts_ptr, rows, ROWS)
    position = tl.load(contexts_ptr + row) + token - tl.load(starts_ptr + row)
    first, tokens, blocks, each, parts = token_parts(
        position, WINDOW, RATIO, SELECTED, SPLITS, LEAST, BLOCK_N
    )
    part = tl.program_id(2)
    if part >= parts:
        return
    head = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_V)
    t = token.to(tl.int64)
    q_ptr += t * q_token + head.to(tl.int64)[:, None] * q_head
    live = (head < HEADS)[:, None] & (column < VALUE)[None, :]
    q = tl.load(q_ptr + column[None, :], mask=live, other=0.0)
    q_rest = q
    if DIM > VALUE:
        more = VALUE + tl.arange(0, BLOCK_R)
        mask = (head < HEADS)[:, None] & (more < DIM)[None, :]
        q_rest = tl.load(q_ptr + more[None, :], mask=mask, other=0.0)
    best = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    begin, stop = part * each, tl.minimum((part + 1) * each, blocks)
    table_ptr += row.to(tl.int64) * table_stride
    for block in range(begin, tl.minimum(stop, tokens)):
        key = first + block * BLOCK_N + tl.arange(0, BLOCK_N)
        seen = key <= position
        page = tl.load(table_ptr + key // PAGE_SIZE, mask=seen, other=0).to(tl.int64)
        vector = cache_ptr + (page * PAGE_SIZE + key % PAGE_SIZE) * DIM
        best, total, acc = join(
            q, q_rest, best, total, acc, vector, seen, scale, DIM, VALUE, BLOCK_V, BLOCK_R
        )
    if RATIO:
        entry_table_ptr += row.to(tl.int64) * entry_table_stride
        for block in range(tl.maximum(begin, tokens), stop):
            entry = (block - tokens) * BLOCK_N + tl.arange(0, BLOCK_N)
            if SELECTED:
                at = selected_ptr + t * SELECTED + entry
                entry = tl.load(at, mask=entry < SELECTED, other=-1).to(tl.int32)
            seen = (entry >= 0) & (entry < (position + 1) // RATIO)
            last = entry * RATIO + RATIO - 1
            page = tl.load(entry_table_ptr + last // PAGE_SIZE, mask=seen, other=0).to(tl.int64)
            place = page * ((PAGE_SIZE + RATIO - 1) // RATIO) + last % PAGE_SIZE // RATIO
            best, total, acc = join(
                q, q_rest, best, total, acc, entries_ptr + place * DIM, seen, scale,
                DIM, VALUE, BLOCK_V, BLOCK_R,
            )  # fmt: skip
    at = t * HEADS + head
    if (SPLITS == 1) | (parts <= 1):
        sink = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        if SINKS:
            sink = tl.load(sinks_ptr + head, mask=head < HEADS, other=0.0) * LOG2E
        out = finish(best, total, acc, sink).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at[:, None] * VALUE + column[None, :], out, mask=live)
    else:
        at = at * SPLITS + part
        tl.store(partial_ptr + at[:, None] * VALUE + column[None, :], acc, mask=live)
        tl.store(stats_ptr + at * 2, best, mask=head < HEADS)
        tl.store(stats_ptr + at * 2 + 1, total, mask=head < HEADS)


@triton.jit
def vector_merge_kernel(
    out_ptr,
    partial_ptr,
    stats_ptr,
    sinks_ptr,
    starts_ptr,
    contexts_ptr,
    rows,
    HEADS: tl.constexpr,
    VALUE: tl.constexpr,
    WINDOW: tl.constexpr,
    RATIO: tl.constexpr,
    SELECTED: tl.constexpr,
    SINKS: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The parts of one query and one head become its result."""
    token, head = tl.program_id(0), tl.program_id(1)
    row = row_of(token, starts_ptr, rows, ROWS)
    position = tl.load(contexts_ptr + row) + token - tl.load(starts_ptr + row)
    _, _, _, _, parts = token_parts(position, WINDOW, RATIO, SELECTED, SPLITS, LEAST, BLOCK_N)
    if parts <= 1:
        return
    part, column = tl.arange(0, SPLITS), tl.arange(0, BLOCK_V)
    at = (token.to(tl.int64) * HEADS + head) * SPLITS + part
    best = tl.load(stats_ptr + at * 2, mask=part < parts, other=LOWEST)
    total = tl.load(stats_ptr + at * 2 + 1, mask=part < parts, other=0.0)
    most = tl.max(best, axis=0)
    if SINKS:
        sink = tl.load(sinks_ptr + head) * LOG2E
        most = tl.maximum(most, sink)
    kept = tl.exp2(best - most)
    denominator = tl.sum(total * kept, axis=0)
    if SINKS:
        denominator += tl.exp2(sink - most)
    inside = (part < parts)[:, None] & (column < VALUE)[None, :]
    acc = tl.load(partial_ptr + at[:, None] * VALUE + column[None, :], mask=inside, other=0.0)
    out = tl.sum(acc * kept[:, None], axis=0) / denominator
    at = (token.to(tl.int64) * HEADS + head) * VALUE + column
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=column < VALUE)
