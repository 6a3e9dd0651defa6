"""Attention over a dense cache for one sequence: what the paged runtime must equal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sixfold.platforms.interface_attention import AttentionSpec


class DenseAttend:
    """Keeps the keys and values of one sequence; usable as a model's `attend`, step after step."""

    def __init__(self, specs: Sequence[AttentionSpec]) -> None:
        self.specs = specs
        self.keys: list[Tensor | None] = [None] * len(specs)
        self.values: list[Tensor | None] = [None] * len(specs)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (T, heads, dim), k and v (T, kv_heads, dim): the sequence's next T tokens."""
        k, v = self._grow(self.keys, layer, k), self._grow(self.values, layer, v)
        spec = self.specs[layer]
        groups = spec.heads // spec.kv_heads
        keys = k.float().repeat_interleave(groups, 1).permute(1, 2, 0)  # (heads, dim, S)
        values = v.float().repeat_interleave(groups, 1).transpose(0, 1)  # (heads, S, dim)
        scores = q.float().transpose(0, 1) @ keys * spec.scale
        if spec.soft_cap:
            scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
        query = torch.arange(len(k) - len(q), len(k))[:, None]
        key = torch.arange(len(k))[None, :]
        hidden = key > query
        if spec.window:
            hidden |= key <= query - spec.window
        scores = scores.masked_fill(hidden, float("-inf"))
        return (scores.softmax(-1) @ values).transpose(0, 1).to(q.dtype)

    @staticmethod
    def _grow(store: list[Tensor | None], layer: int, new: Tensor) -> Tensor:
        old = store[layer]
        both = new if old is None else torch.cat([old, new])
        store[layer] = both
        return both
