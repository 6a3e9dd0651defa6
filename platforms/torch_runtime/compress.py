"""Generic kernel of compressing tokens into cache entries (`common/ops/compress.py`).

All shapes follow from those of the arguments, so that a captured step stays one: a step of T tokens
completes at most T // ratio + rows entries, and each has a place, used or not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .interleaved_rope import turn_pairs, unit
from .state_slots import idle_slot


@dataclass(frozen=True, slots=True)
class _Entries:
    """E places for entries that the step may complete."""

    row: Tensor  # (E,)
    token: Tensor  # (E,) that completes it, counted in the step; 0 where unused
    position: Tensor  # (E,) of that token in its row
    used: Tensor  # (E,) bool


def compress_norm_rope_store(
    projected: Tensor,
    state: Tensor,
    slots: Tensor,
    ape: Tensor,
    weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    page_table: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    page_size: int,
) -> tuple[Tensor, Tensor]:
    if not len(projected):
        return state, cache
    made = _entries(len(projected), len(ape), slots, query_start, context_lens)
    window = _window(made, projected, state, slots, ape, context_lens, len(weight))
    pooled = _pool(*window, ape, len(weight))
    turned = turn_pairs(unit(pooled, eps) * weight, cos[made.token], sin[made.token])
    _store(made, turned, cache, page_table, page_size, len(ape))
    return _append(projected, state, slots, query_start, context_lens), cache


def _entries(
    tokens: int, ratio: int, slots: Tensor, query_start: Tensor, context_lens: Tensor
) -> _Entries:
    before = context_lens.long() // ratio
    ends = context_lens.long() + query_start[1:] - query_start[:-1]
    counts = (ends // ratio - before) * (slots >= 0)
    first = counts.cumsum(0)
    place = torch.arange(min(tokens, tokens // ratio + len(slots)), device=slots.device)
    row = torch.searchsorted(first, place, right=True).clamp(max=len(slots) - 1)
    used = place < first[-1]
    nth = place - (first - counts)[row]
    position = (before[row] + nth + 1) * ratio - 1
    token = query_start[row].long() + position - context_lens[row]
    return _Entries(row, torch.where(used, token, 0), position, used)


def _window(
    made: _Entries,
    projected: Tensor,
    state: Tensor,
    slots: Tensor,
    ape: Tensor,
    context_lens: Tensor,
    dim: int,
) -> tuple[Tensor, Tensor]:
    """(E, C * r, 2 * C * D) projections that each entry is made of, and which there are."""
    ratio, width = ape.shape
    count = width // dim * ratio
    back = torch.arange(1 - count, 1, device=slots.device)
    position = made.position.unsqueeze(1) + back
    new = position >= context_lens[made.row].unsqueeze(1)
    there = (position >= 0) & made.used.unsqueeze(1)
    slot = slots[made.row].clamp(min=0).long().unsqueeze(1)
    old = state[slot, position % state.shape[1]]
    token = (made.token.unsqueeze(1) + back).clamp(min=0)
    return torch.where(new.unsqueeze(-1), projected[token].float(), old), there


def _pool(window: Tensor, there: Tensor, ape: Tensor, dim: int) -> Tensor:
    """(E, C * r, 2 * C * D) -> (E, D): part c of the places by part c of the columns."""
    ratio, width = ape.shape
    parts = width // dim
    # Places and columns both in parts: (E, C, r, keys or scores, C, D), of which C = C is wanted.
    apart = window.unflatten(1, (parts, ratio)).unflatten(-1, (2, parts, dim))
    apart = apart.diagonal(dim1=1, dim2=4).movedim(-1, 1)
    bias = ape.view(ratio, parts, dim).transpose(0, 1)
    missing = ~there.unflatten(1, (parts, ratio)).unsqueeze(-1)
    keys = apart[:, :, :, 0].masked_fill(missing, 0.0).flatten(1, 2)
    scores = (apart[:, :, :, 1] + bias).masked_fill(missing, -torch.inf).flatten(1, 2)
    return (scores.softmax(dim=1) * keys).sum(dim=1)


def _store(
    made: _Entries, turned: Tensor, cache: Tensor, table: Tensor, page_size: int, ratio: int
) -> None:
    """Unused places write back what the first entry of the null page holds."""
    page = table[made.row, (made.position // page_size).clamp(max=table.shape[1] - 1)].long()
    where = page * -(-page_size // ratio) + made.position % page_size // ratio
    where = torch.where(made.used, where, 0)
    new = torch.where(made.used.unsqueeze(1), turned.to(cache.dtype), cache[:1])
    cache.index_copy_(0, where, new)


def _append(
    projected: Tensor, state: Tensor, slots: Tensor, query_start: Tensor, context_lens: Tensor
) -> Tensor:
    """The last tokens of each row into its ring. The others write back what a place holds that no
    row of the step has."""
    ring = state.shape[1]
    token = torch.arange(len(projected), device=slots.device)
    row = torch.searchsorted(query_start[1:].contiguous(), token.to(query_start.dtype), right=True)
    position = context_lens[row] + token - query_start[row]
    kept = (token >= query_start[row + 1] - ring) & (slots[row] >= 0)
    idle = idle_slot(slots, len(state)) * ring
    places = state.view(-1, state.shape[2])
    where = torch.where(kept, slots[row].long() * ring + position % ring, idle)
    new = torch.where(kept.unsqueeze(1), projected.float(), places.index_select(0, idle))
    places.index_copy_(0, where, new)
    return state
