"""A model's step as a program over bound attention plans: what eager, captured and replayed steps
have in common. Everything that depends on a step's content is in its inputs and its plans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from ...models.base import Model
from ...models.vision import ImageRows
from ..interface_attention import AttentionBackend, AttentionSpec
from ..interface_kernels import KernelTable
from ..interface_kv import KVGroup
from ..interface_step import StepBatch
from ..sampling_rows import no_sampling
from .pools import TorchKVPool

OUTSIDE = frozenset({"sample", "logprobs", "page_copy", "segment_attention"})
"""Ops that the runtime calls before or after the program."""


class NotCaptured(Exception):
    """A step cannot be captured; the text says why."""


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """A cache group as the runtime uses it: its layers in the model's order."""

    group: KVGroup
    pool: TorchKVPool
    layers: tuple[int, ...]


class StepRunner(Protocol):
    def __call__(self, batch: StepBatch, token_ids: Tensor, positions: Tensor) -> Tensor:
        """token_ids, positions (T,) int64 on the device -> hidden states (T, width), valid until
        the next call."""
        ...


class StepProgram:
    """The model, its cache groups and its attention backend."""

    def __init__(
        self,
        model: Model,
        groups: Sequence[CacheGroup],
        attention: AttentionBackend,
        specs: Sequence[AttentionSpec],
        ops: KernelTable,
        max_context: int,
    ) -> None:
        self.attention = attention
        self._max_context = max_context
        self._model = model
        self._groups = tuple(groups)
        self._specs = specs
        self._ops = ops
        self._place = {
            layer: (index, place)
            for index, group in enumerate(groups)
            for place, layer in enumerate(group.layers)
        }

    def plan(self, batch: StepBatch) -> list[Any]:
        """One plan per group; host work only."""
        return [self.attention.plan(batch, group.group) for group in self._groups]

    def bind(self, plans: Sequence[Any], reserved: Sequence[Any] | None = None) -> list[Any]:
        """The plans on the device, in fresh buffers or in those reserved."""
        if reserved is None:
            return [self.attention.bind(plan) for plan in plans]
        pairs = zip(plans, reserved, strict=True)
        return [self.attention.bind(plan, place) for plan, place in pairs]

    def reserve(self, rows: int, tokens: int) -> list[Any]:
        """Buffers for plans of at most so many rows and tokens, one per group. Raises KernelError
        where the backend's plans have no fixed shape."""
        longest = self._max_context
        return [
            self.attention.reserve(group.group, rows, tokens, longest) for group in self._groups
        ]

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        bound: Sequence[Any],
        images: ImageRows | None = None,
    ) -> Tensor:
        """(T,), (T,) int64 -> hidden states (T, width); with images also positions (3, T)."""

        def attend(
            layer: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None
        ) -> Tensor:
            index, place = self._place[layer]
            spec = self._specs[layer]
            if spec.sinks != (sinks is not None):
                raise ValueError(f"layer {layer}: its spec and its call disagree about sinks")
            pool = self._groups[index].pool
            result: Tensor = self.attention.run(bound[index], pool, place, q, k, v, spec, sinks)
            return result

        given = {} if images is None else {"images": images}
        hidden: Tensor = self._model(token_ids, positions, attend, **given)
        return hidden

    def run(
        self,
        batch: StepBatch,
        token_ids: Tensor,
        positions: Tensor,
        images: ImageRows | None = None,
    ) -> Tensor:
        """The StepRunner without capture: op by op, on fresh buffers."""
        return self.forward(token_ids, positions, self.bind(self.plan(batch)), images)

    def unsafe_kernels(self) -> list[str]:
        """Kernels of the program that a captured step cannot hold."""
        return [
            f"{op}={kernel.provider}"
            for op, kernel in self._ops.kernels.items()
            if op not in OUTSIDE and not kernel.graph_safe
        ]

    def rehearsal(self, lengths: Sequence[int]) -> StepBatch:
        """A step of rows with so many new tokens each, that reads and writes null pages only."""
        rows, most = len(lengths), max(lengths)
        tables = {g.group.name: -(-most // g.group.page_size) for g in self._groups}
        return StepBatch(
            step=-1,
            row_ids=np.zeros(rows, np.int32),
            token_ids=np.zeros(sum(lengths), np.int32),
            query_start=np.concatenate(([0], np.cumsum(lengths))).astype(np.int32),
            context_lens=np.zeros(rows, np.int32),
            page_tables={name: np.zeros((rows, n), np.int32) for name, n in tables.items()},
            want=np.zeros(rows, np.uint8),
            sampling=no_sampling(rows),
        )
