"""The gated delta rule over a step's rows with their states in slots (`common/ops/gated_delta.py`).

Rows follow the recurrence, token by token, in one launch. Where the table says so (`delta_single`)
a second launch takes the longer rows in chunks (Yang, Kautz and Hatamizadeh 2024, section 3.3), in
steps that have more tokens than rows. What is launched follows from shapes and the table alone, so
that a device graph can hold it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...common.ops.gated_delta import EPS as UNIT_EPS
from .launch import ceil_div, heads_of
from .tuning import Tuning, power_of_two

EPS = tl.constexpr(UNIT_EPS)


@triton.jit
def log_decay(a, a_log, dt_bias):
    """-exp(a_log) * softplus(a + dt_bias)."""
    x = a + dt_bias
    return -tl.exp(a_log) * (tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x))))


@triton.jit
def recurrent_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    a_ptr,
    b_ptr,
    a_log_ptr,
    dt_bias_ptr,
    state_ptr,
    out_ptr,
    slots_ptr,
    starts_ptr,
    contexts_ptr,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    a_token,
    b_token,
    slot_stride,
    MOST: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One row of up to MOST tokens (0: of any number), one value head, BLOCK_V columns of its
    state, which stay in registers. A row without a slot gets zeros."""
    row, head = tl.program_id(0), tl.program_id(1)
    first, end = tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    if (first == end) | ((MOST > 0) & (end - first > MOST)):
        return
    i, j = tl.arange(0, BLOCK_K), tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    is_key, is_value = i < KEY, j < VALUE
    out_ptr += head * VALUE + j
    begin = first.to(tl.int64)
    if slot < 0:
        nothing = tl.zeros((BLOCK_V,), out_ptr.dtype.element_ty)
        for n in range(end - first):
            tl.store(out_ptr + (begin + n) * (HEADS * VALUE), nothing, mask=is_value)
        return
    at = slot * slot_stride + (head * KEY + i[:, None]) * VALUE + j[None, :]
    inside = is_key[:, None] & is_value[None, :]
    begun = inside & (tl.load(contexts_ptr + row) > 0)
    state = tl.load(state_ptr + at, mask=begun, other=0.0)
    a_log, dt_bias = tl.load(a_log_ptr + head), tl.load(dt_bias_ptr + head)
    q_ptr += head // GROUP * q_head + i
    k_ptr += head // GROUP * k_head + i
    v_ptr += head * v_head + j
    for n in range(end - first):
        t = begin + n
        q = tl.load(q_ptr + t * q_token, mask=is_key, other=0.0).to(tl.float32)
        k = tl.load(k_ptr + t * k_token, mask=is_key, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + t * v_token, mask=is_value, other=0.0).to(tl.float32)
        a = tl.load(a_ptr + t * a_token + head).to(tl.float32)
        beta = tl.sigmoid(tl.load(b_ptr + t * b_token + head).to(tl.float32))
        q *= tl.rsqrt((tl.sum(q * q, axis=0) + EPS) * KEY)
        k *= tl.rsqrt(tl.sum(k * k, axis=0) + EPS)
        state *= tl.exp(log_decay(a, a_log, dt_bias))
        change = beta * (v - tl.sum(state * k[:, None], axis=0))
        state += k[:, None] * change[None, :]
        out = tl.sum(state * q[:, None], axis=0).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + t * (HEADS * VALUE), out, mask=is_value)
    tl.store(state_ptr + at, state, mask=inside)


@triton.jit
def unit_rows(x_ptr, token, stride, live, i, KEY: tl.constexpr):
    """(N, BLOCK_K) rows of length one, float32; zeros where there is no token."""
    at = token.to(tl.int64)[:, None] * stride + i[None, :]
    x = tl.load(x_ptr + at, mask=live[:, None] & (i < KEY)[None, :], other=0.0).to(tl.float32)
    return x * tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) + EPS)


@triton.jit
def unit_lower_inverse(mixing, N: tl.constexpr):
    """(1 + mixing)^-1 of a strictly lower triangular (N, N), by forward substitution: row n is its
    unit row less what the rows above it contribute."""
    n = tl.arange(0, N)
    solved = tl.where(n[:, None] == n[None, :], 1.0, 0.0)
    for step in range(1, N):
        mine = tl.sum(tl.where(n[:, None] == step, mixing, 0.0), axis=0)
        known = tl.sum(mine[:, None] * tl.where(n[:, None] < step, solved, 0.0), axis=0)
        solved -= tl.where(n[:, None] == step, known[None, :], 0.0)
    return solved


@triton.jit
def chunk_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    a_ptr,
    b_ptr,
    a_log_ptr,
    dt_bias_ptr,
    state_ptr,
    out_ptr,
    slots_ptr,
    starts_ptr,
    contexts_ptr,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    a_token,
    b_token,
    slot_stride,
    MOST: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The same of rows with more than MOST tokens, CHUNK of them at a time."""
    row, head = tl.program_id(0), tl.program_id(1)
    first, end = tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    if end - first <= MOST:
        return
    n, i = tl.arange(0, CHUNK), tl.arange(0, BLOCK_K)
    j = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    is_value = j < VALUE
    q_ptr += head // GROUP * q_head
    k_ptr += head // GROUP * k_head
    v_ptr += head * v_head
    out_ptr += head * VALUE
    at = slot * slot_stride + (head * KEY + i[:, None]) * VALUE + j[None, :]
    inside = (i < KEY)[:, None] & is_value[None, :] & (slot >= 0)
    begun = inside & (tl.load(contexts_ptr + row) > 0)
    state = tl.load(state_ptr + at, mask=begun, other=0.0)
    a_log, dt_bias = tl.load(a_log_ptr + head), tl.load(dt_bias_ptr + head)
    for start in range(first, end, CHUNK):
        token = start + n
        live = token < end
        t = token.to(tl.int64)
        k = unit_rows(k_ptr, token, k_token, live, i, KEY)
        a = tl.load(a_ptr + t * a_token + head, mask=live, other=0.0).to(tl.float32)
        b = tl.load(b_ptr + t * b_token + head, mask=live, other=0.0).to(tl.float32)
        # Where there is no token nothing decays and nothing is written.
        beta = tl.where(live, tl.sigmoid(b), 0.0)
        total = tl.cumsum(tl.where(live, log_decay(a, a_log, dt_bias), 0.0), axis=0)
        # Masked before the exponential: above the diagonal it would overflow.
        lower = n[:, None] >= n[None, :]
        decay = tl.exp(tl.where(lower, total[:, None] - total[None, :], float("-inf")))
        alike = tl.dot(k, tl.trans(k), input_precision="ieee") * decay * beta[:, None]
        mixing = tl.where(n[:, None] > n[None, :], alike, 0.0)
        since = tl.exp(total)
        at_v = t[:, None] * v_token + j[None, :]
        here = live[:, None] & is_value[None, :]
        v = tl.load(v_ptr + at_v, mask=here, other=0.0).to(tl.float32)
        wanted = v - tl.dot(k, state, input_precision="ieee") * since[:, None]
        solved = unit_lower_inverse(mixing, CHUNK)
        new = tl.dot(solved, beta[:, None] * wanted, input_precision="ieee")
        q = unit_rows(q_ptr, token, q_token, live, i, KEY)
        seen = tl.dot(q, tl.trans(k), input_precision="ieee") * decay
        out = tl.dot(q, state, input_precision="ieee") * since[:, None]
        out = tl.dot(seen, new, out, input_precision="ieee") * tl.rsqrt(KEY * 1.0)
        out = tl.where(slot >= 0, out, 0.0).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + t[:, None] * (HEADS * VALUE) + j[None, :], out, mask=here)
        last = tl.sum(tl.where(n == CHUNK - 1, total, 0.0), axis=0)
        left = k * tl.exp(last - total)[:, None]
        state = tl.dot(tl.trans(left), new, state * tl.exp(last), input_precision="ieee")
    tl.store(state_ptr + at, state, mask=inside)


def gated_delta(
    tuning: Tuning,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    slots: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
) -> tuple[Tensor, Tensor]:
    """Slots of `state` may lie apart; one slot is one piece of memory."""
    tokens, heads, value = v.shape
    out = torch.empty((tokens, heads, value), dtype=v.dtype, device=v.device)
    rows = len(slots)
    if not tokens:
        return out, state
    q, k, v = heads_of(q), heads_of(k), heads_of(v)
    a, b = (x if x.stride(1) == 1 or heads == 1 else x.contiguous() for x in (a, b))
    inputs = (q, k, v, a, b, a_log, dt_bias, state, out, slots, query_start, context_lens)
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], a.stride(0), b.stride(0))
    known = {"HEADS": heads, "GROUP": heads // q.shape[1], "KEY": q.shape[2], "VALUE": value}
    short = tuning.delta_single if tokens > rows else 0
    for tile, chunked in ((tuning.delta, False), (tuning.delta_chunk, True)):
        if chunked and not short:
            break
        block_v = min(tile.block_n, max(16, power_of_two(value)))
        block_k = max(16, power_of_two(q.shape[2]))
        kernel = chunk_kernel if chunked else recurrent_kernel
        chunk = {"CHUNK": tile.block_m} if chunked else {}
        kernel[(rows, heads, ceil_div(value, block_v))](
            *inputs,
            *strides,
            state.stride(0),
            MOST=short,
            **known,
            **chunk,
            BLOCK_K=block_k,
            BLOCK_V=block_v,
            **tile.launch,
        )
    return out, state
