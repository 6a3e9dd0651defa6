"""Generic kernels of latent attention and of joining partial attention."""

from __future__ import annotations

import torch
from torch import Tensor

QUERY_BLOCK = 256
"""Queries of a long row that share one product with its latents; bounds the scores' memory."""


def merge_state(
    first: Tensor, first_lse: Tensor, second: Tensor, second_lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Weights are relative to the larger part: a large log-sum-exp has no digits to spare."""
    most = torch.maximum(first_lse, second_lse)
    shift = most.masked_fill(most == -torch.inf, 0.0)
    weights = [(lse - shift).exp() for lse in (first_lse, second_lse)]
    total = weights[0] + weights[1]
    share = [weight / total.clamp(min=1e-30) for weight in weights]
    # A part that saw nothing counts 0, whatever it holds.
    parts = [
        part.float().masked_fill((lse == -torch.inf).unsqueeze(-1), 0.0)
        for part, lse in ((first, first_lse), (second, second_lse))
    ]
    joined = parts[0] * share[0].unsqueeze(-1) + parts[1] * share[1].unsqueeze(-1)
    return joined.to(first.dtype), most + total.log()


def latent_attention(
    q: Tensor,
    latents: Tensor,
    cache: Tensor,
    page_table: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    page_size: int,
    value_dim: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Where every row has one token, all rows at once, as wide as the page table. Otherwise row by
    row, with the rows' lengths read on the host."""
    token = torch.arange(len(q), device=q.device, dtype=query_start.dtype)
    row = torch.searchsorted(query_start[1:].contiguous(), token, right=True)
    position = context_lens[row] + token - query_start[row]
    pages = page_table[row, position // page_size].long()
    cache.index_copy_(0, pages * page_size + position % page_size, latents)
    if len(q) == len(page_table):
        past = _gather(cache, page_table, page_size)
        return _attend(q.unsqueeze(1), past, position.unsqueeze(1), value_dim, scale)[:, 0], cache
    result = q.new_empty(*q.shape[:2], value_dim)
    starts, contexts = query_start.tolist(), context_lens.tolist()
    for r, context in enumerate(contexts):
        width = -(-(context + starts[r + 1] - starts[r]) // page_size)
        past = _gather(cache, page_table[r : r + 1, :width], page_size)
        for first in range(starts[r], starts[r + 1], QUERY_BLOCK):
            where = slice(first, min(first + QUERY_BLOCK, starts[r + 1]))
            part = _attend(q[where].unsqueeze(0), past, position[where][None], value_dim, scale)
            result[where] = part[0]
    return result, cache


def _gather(cache: Tensor, pages: Tensor, page_size: int) -> Tensor:
    """pages (R, P) -> (R, P * page_size, D)."""
    blocks = cache.view(-1, page_size * cache.shape[1])
    found = blocks.index_select(0, pages.reshape(-1))
    return found.view(len(pages), pages.shape[1] * page_size, cache.shape[1])


def _attend(q: Tensor, past: Tensor, position: Tensor, value_dim: int, scale: float) -> Tensor:
    """q (R, n, heads, D), past (R, L, D), position (R, n) -> (R, n, heads, value_dim)."""
    place = torch.arange(past.shape[1], device=q.device)
    hidden = place > position.unsqueeze(-1)
    # What nobody sees gets the weight 0, which a NaN survives.
    past = past.float().masked_fill(hidden.all(dim=1).unsqueeze(-1), 0.0)
    rows, count, heads, dim = q.shape
    together = q.reshape(rows, count * heads, dim).float()
    logits = (together @ past.mT * scale).view(rows, count, heads, len(place))
    weights = logits.masked_fill(hidden.unsqueeze(2), -torch.inf).softmax(dim=-1)
    made = weights.view(rows, count * heads, len(place)) @ past[..., :value_dim]
    return made.view(rows, count, heads, value_dim).to(q.dtype)
