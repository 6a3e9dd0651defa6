"""A model's caches for one sequence, and its steps over them: what the paged runtime must equal.

Pages lie in shuffled order, and what nobody has written is NaN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sixfold.models.base import Model, Pages, State
from sixfold.platforms.interface_kv import CacheNeed, KVKind

SLOT = 1


@dataclass(frozen=True)
class PlainStep:
    caches: Sequence[Any]
    needs: Sequence[CacheNeed]
    table: Tensor
    page_size: int
    query_start: Tensor
    context_lens: Tensor

    def pages(self, site: int) -> Pages:
        rows = self.needs[site].entries(self.page_size)
        return Pages(self.caches[site], self.table, self.page_size, rows)

    def state(self, site: int) -> State:
        return State(tuple(self.caches[site]), torch.tensor([SLOT], dtype=torch.int32))


class PlainCache:
    """For models that are given all their caches. States are float32, pages of `dtype`."""

    def __init__(self, model: Model, page_size: int, tokens: int, dtype: torch.dtype) -> None:
        self.needs = model.cache_needs()
        self.dtype = dtype
        self.page_size = page_size
        count = -(-tokens // page_size)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(3))
        self.table = (order + 1).int().unsqueeze(0)
        self.caches = [self._reserve(need, count + 1) for need in self.needs]

    def _reserve(self, need: CacheNeed, pages: int) -> Any:
        if need.kind is KVKind.RECURRENT:
            return [torch.full((SLOT + 1, *state.shape), torch.nan) for state in need.states]
        shape = (pages * need.entries(self.page_size), need.head_dim)
        return torch.full(shape, torch.nan, dtype=self.dtype)

    def step(self, context: int, new: int) -> PlainStep:
        start, lens = torch.tensor([0, new]).int(), torch.tensor([context]).int()
        return PlainStep(self.caches, self.needs, self.table, self.page_size, start, lens)


def logits(
    model: Model,
    token_ids: Tensor,
    chunks: Sequence[int] = (),
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(T, vocabulary) for one sequence, given to the model in pieces of these sizes."""
    cache, done, made = PlainCache(model, page_size, len(token_ids), dtype), 0, []
    with torch.inference_mode():
        for count in chunks or [len(token_ids)]:
            positions = torch.arange(done, done + count)
            step = cache.step(done, count)
            made.append(model.logits(model(token_ids[done : done + count], positions, step)))
            done += count
    return torch.cat(made)
