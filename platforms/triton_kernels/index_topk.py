"""The indexer's choice: scores of all entries that a query sees, then the best of them.

A score becomes an integer that orders as it does. Eight rounds of four bits find the smallest
integer that is among the best (a radix selection); a last walk over the scores writes the entries,
ascending, equals of the smallest by the lowest entry: no sort, and the same result every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import ceil_div, heads_of, rows_of
from .tuning import Tuning, power_of_two
from .vector_kernels import row_of

LEAST_DEPTH = 16
"""Of a product's inner dimension, on every matrix unit there is."""


@triton.jit
def scores_kernel(
    q_ptr,
    weights_ptr,
    cache_ptr,
    scores_ptr,
    table_ptr,
    starts_ptr,
    contexts_ptr,
    rows,
    q_token,
    q_head,
    weights_token,
    table_stride,
    most,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    RATIO: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One query, BLOCK_N entries, BLOCK_M heads at a time."""
    token = tl.program_id(0)
    row = row_of(token, starts_ptr, rows, ROWS)
    position = tl.load(contexts_ptr + row) + token - tl.load(starts_ptr + row)
    visible = (position + 1) // RATIO
    begin = tl.program_id(1) * BLOCK_N
    if begin >= visible:
        return
    entry, column = begin + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    seen = entry < visible
    last = entry * RATIO + RATIO - 1
    table_ptr += row.to(tl.int64) * table_stride
    page = tl.load(table_ptr + last // PAGE_SIZE, mask=seen, other=0).to(tl.int64)
    place = page * ((PAGE_SIZE + RATIO - 1) // RATIO) + last % PAGE_SIZE // RATIO
    mask = seen[:, None] & (column < DIM)[None, :]
    keys = tl.load(cache_ptr + place[:, None] * DIM + column[None, :], mask=mask, other=0.0)
    t = token.to(tl.int64)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, HEADS, BLOCK_M):
        head = start + tl.arange(0, BLOCK_M)
        at = t * q_token + head.to(tl.int64)[:, None] * q_head + column[None, :]
        mask = (head < HEADS)[:, None] & (column < DIM)[None, :]
        q = tl.load(q_ptr + at, mask=mask, other=0.0)
        at = weights_ptr + t * weights_token + head
        weight = tl.load(at, mask=head < HEADS, other=0.0).to(tl.float32)
        products = tl.dot(q, tl.trans(keys), input_precision="ieee")
        total += tl.sum(tl.maximum(products, 0.0) * weight[:, None], axis=0)
    tl.store(scores_ptr + t * most + entry, total, mask=seen)


@triton.jit
def ordered(scores_ptr, start, visible, BLOCK: tl.constexpr):
    """(BLOCK,) integers that order as the scores do, and which there are. No score is -0: they are
    sums that begin with 0."""
    entry = start + tl.arange(0, BLOCK)
    there = entry < visible
    score = tl.load(scores_ptr + entry, mask=there, other=0.0)
    bits = score.to(tl.uint32, bitcast=True)
    sign = tl.full((), 0x80000000, tl.uint32)
    every = tl.full((), 0xFFFFFFFF, tl.uint32)
    return tl.where(bits >= sign, bits ^ every, bits | sign), there


@triton.jit
def select_kernel(
    scores_ptr,
    out_ptr,
    starts_ptr,
    contexts_ptr,
    rows,
    most,
    RATIO: tl.constexpr,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One query. Where it sees no more than TOP_K entries they are all chosen, unread."""
    token = tl.program_id(0)
    row = row_of(token, starts_ptr, rows, ROWS)
    position = tl.load(contexts_ptr + row) + token - tl.load(starts_ptr + row)
    visible = (position + 1) // RATIO
    scores_ptr += token.to(tl.int64) * most
    out_ptr += token.to(tl.int64) * TOP_K
    if visible <= TOP_K:
        for start in range(0, TOP_K, BLOCK_K):
            place = start + tl.arange(0, BLOCK_K)
            chosen = tl.where(place < visible, place, -1).to(tl.int64)
            tl.store(out_ptr + place, chosen, mask=place < TOP_K)
    else:
        # The digits of the smallest chosen integer, and how many of its equals are wanted.
        digit = tl.arange(0, 16).to(tl.uint32)
        least = tl.zeros((), tl.uint32)
        wanted = tl.zeros((), tl.int32) + TOP_K
        for nth in tl.static_range(8):
            shift = 28 - 4 * nth
            counts = tl.zeros((16,), tl.int32)
            for start in range(0, visible, BLOCK):
                value, there = ordered(scores_ptr, start, visible, BLOCK)
                if nth > 0:
                    there = there & ((value >> (shift + 4)) == (least >> (shift + 4)))
                mine = (value >> shift) & 15
                same = there[:, None] & (mine[:, None] == digit[None, :])
                counts += tl.sum(same.to(tl.int32), axis=0)
            above = tl.sum(counts, axis=0) - tl.cumsum(counts, axis=0)
            # Of larger digits there are fewer than are wanted, with this one there are enough.
            here = (above < wanted) & (above + counts >= wanted)
            found = tl.sum(tl.where(here, digit.to(tl.int32), 0), axis=0)
            wanted -= tl.sum(tl.where(here, above, 0), axis=0)
            least = least | (found.to(tl.uint32) << shift)
        written = tl.zeros((), tl.int32)
        equals = tl.zeros((), tl.int32)
        for start in range(0, visible, BLOCK):
            value, there = ordered(scores_ptr, start, visible, BLOCK)
            same = (there & (value == least)).to(tl.int32)
            nth_equal = equals + tl.cumsum(same, axis=0)
            chosen = there & ((value > least) | ((same == 1) & (nth_equal <= wanted)))
            place = written + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
            entry = (start + tl.arange(0, BLOCK)).to(tl.int64)
            tl.store(out_ptr + place, entry, mask=chosen)
            written += tl.sum(chosen.to(tl.int32), axis=0)
            equals += tl.sum(same, axis=0)


def index_topk(
    tuning: Tuning,
    q: Tensor,
    weights: Tensor,
    cache: Tensor,
    page_table: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    page_size: int,
    ratio: int,
    top_k: int,
) -> Tensor:
    tokens, heads, dim = q.shape
    out = torch.empty((tokens, top_k), dtype=torch.int64, device=q.device)
    if not tokens:
        return out
    most = max(1, page_table.shape[1] * page_size // ratio)
    scores = torch.empty((tokens, most), dtype=torch.float32, device=q.device)
    q, weights = heads_of(q), rows_of(weights)
    tile = tuning.index_float32 if q.element_size() == 4 else tuning.index
    where = (query_start, context_lens, len(context_lens))
    places = power_of_two(len(context_lens))
    scores_kernel[(tokens, ceil_div(most, tile.block_n))](
        q,
        weights,
        cache,
        scores,
        page_table,
        *where,
        *q.stride()[:2],
        weights.stride(0),
        page_table.stride(0),
        most,
        HEADS=heads,
        DIM=dim,
        PAGE_SIZE=page_size,
        RATIO=ratio,
        ROWS=places,
        BLOCK_M=min(tile.block_m, max(LEAST_DEPTH, power_of_two(heads))),
        BLOCK_N=tile.block_n,
        BLOCK_D=max(LEAST_DEPTH, power_of_two(dim)),
        **tile.launch,
    )
    select_kernel[(tokens,)](
        scores,
        out,
        *where,
        most,
        RATIO=ratio,
        TOP_K=top_k,
        ROWS=places,
        BLOCK=tuning.select.block_n,
        BLOCK_K=power_of_two(min(top_k, tuning.select.block_n)),
        **tuning.select.launch,
    )
    return out
