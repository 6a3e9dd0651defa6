"""The short causal convolution over a step's rows: decode and ragged prefill in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import ceil_div, rows_of
from .tuning import Tuning, at_most, power_of_two

TOKENS, PARTS = 16, 16
"""Of a row that a program takes at once, and programs that share a row."""


@triton.jit
def conv1d_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    state_ptr,
    out_ptr,
    slots_ptr,
    starts_ptr,
    contexts_ptr,
    channels,
    x_stride,
    slot_stride,
    TAPS: tl.constexpr,
    BIASED: tl.constexpr,
    ACTIVATE: tl.constexpr,
    KEPT: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Blocks of TOKENS tokens of one row: part, part + parts, and so on. Only a row's first block
    reaches into its state, so the program that has it also leaves the new one. KEPT: TAPS - 1 as a
    power of two, at most TOKENS unless all rows have one token."""
    row, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    first = tl.load(starts_ptr + row)
    count = tl.load(starts_ptr + row + 1) - first
    slot = tl.load(slots_ptr + row).to(tl.int64)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < channels
    old = inside & (slot >= 0) & (tl.load(contexts_ptr + row) > 0)
    x_ptr += first.to(tl.int64) * x_stride
    state_ptr += slot * slot_stride
    out_ptr += first.to(tl.int64) * channels
    kept = tl.arange(0, KEPT)
    # Behind the last token: what stays of the old state lies `count` places on in it.
    here = (kept < TAPS - 1) & (part == 0) & (count > 0)
    place = count - (TAPS - 1) + kept
    source = (kept + count).to(tl.int64)[:, None] * channels + column[None, :]
    left = tl.load(state_ptr + source, mask=(here & (place < 0))[:, None] & old[None, :], other=0.0)
    source = place.to(tl.int64)[:, None] * x_stride + column[None, :]
    new = tl.load(x_ptr + source, mask=(here & (place >= 0))[:, None] & inside[None, :], other=0.0)
    new = tl.where((place >= 0)[:, None], new, left)
    for begin in range(part * TOKENS, count, parts * TOKENS):
        token = begin + tl.arange(0, TOKENS)
        live = token < count
        total = tl.zeros((TOKENS, COLUMNS), tl.float32)
        for i in tl.static_range(TAPS):
            seen = token - (TAPS - 1) + i
            at = seen.to(tl.int64)[:, None] * x_stride + column[None, :]
            mask = (live & (seen >= 0))[:, None] & inside[None, :]
            value = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
            at = (seen + TAPS - 1).to(tl.int64)[:, None] * channels + column[None, :]
            mask = (live & (seen < 0))[:, None] & old[None, :]
            value += tl.load(state_ptr + at, mask=mask, other=0.0).to(tl.float32)
            weight = tl.load(weight_ptr + column * TAPS + i, mask=inside, other=0.0)
            total += value * weight.to(tl.float32)[None, :]
        if BIASED:
            total += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        if ACTIVATE:
            total *= tl.sigmoid(total)
        total = tl.where(slot >= 0, total, 0.0).to(out_ptr.dtype.element_ty)
        at = token.to(tl.int64)[:, None] * channels + column[None, :]
        tl.store(out_ptr + at, total, mask=live[:, None] & inside[None, :])
    # Other lanes have read what this overwrites.
    tl.debug_barrier()
    target = kept.to(tl.int64)[:, None] * channels + column[None, :]
    tl.store(state_ptr + target, new, mask=(here & (slot >= 0))[:, None] & inside[None, :])


def conv1d_update(
    tuning: Tuning,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    slots: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    activate: bool,
) -> tuple[Tensor, Tensor]:
    """Slots of `state` may lie apart; one slot is one piece of memory."""
    x, weight = rows_of(x), weight.contiguous()
    (tokens, channels), (_, taps), rows = x.shape, weight.shape, len(slots)
    out = torch.empty((tokens, channels), dtype=x.dtype, device=x.device)
    if not tokens:
        return out, state
    kept = power_of_two(taps - 1)
    # As many tokens as rows may still be a row of two beside one of none.
    block = max(kept, TOKENS if tokens > rows else 1)
    columns = min(power_of_two(channels), max(32, at_most(tuning.row_elements // block)))
    parts = min(PARTS, ceil_div(tokens, block)) if tokens > rows else 1
    conv1d_kernel[(rows, parts, ceil_div(channels, columns))](
        x,
        weight,
        x if bias is None else bias,
        state,
        out,
        slots,
        query_start,
        context_lens,
        channels,
        x.stride(0),
        state.stride(0),
        TAPS=taps,
        BIASED=bias is not None,
        ACTIVATE=activate,
        KEPT=kept,
        TOKENS=block,
        COLUMNS=columns,
        num_warps=tuning.warps(block * columns),
    )
    return out, state
