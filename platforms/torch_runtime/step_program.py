"""A model's step as a program over bound attention plans: what eager, captured and replayed steps
have in common. Everything that depends on a step's content is in its inputs and its plans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from ...models.base import Model
from ...models.vision import ImageRows
from ..interface_attention import AttentionBackend, AttentionSpec
from ..interface_kernels import KernelTable
from ..interface_kv import KVKind
from ..interface_step import StepBatch
from ..sampling_rows import no_sampling
from .device import TorchDevice
from .pools import TorchKVPool
from .site_pools import TorchRowPool
from .step_caches import (
    NO_SLOT,
    AttentionPart,
    BoundStep,
    CacheGroup,
    PagesPart,
    Part,
    RowsPart,
    SlotsPart,
)

OUTSIDE = frozenset({"sample", "logprobs", "page_copy", "segment_attention"})
"""Ops that the runtime calls before or after the program."""


class NotCaptured(Exception):
    """A step cannot be captured; the text says why."""


class StepRunner(Protocol):
    def __call__(self, batch: StepBatch, token_ids: Tensor, positions: Tensor) -> Tensor:
        """token_ids, positions (T,) int64 on the device -> hidden states (T, width), valid until
        the next call."""
        ...


class StepProgram:
    """The model, its cache groups and its attention backend (None: its own ops attend)."""

    def __init__(
        self,
        model: Model,
        groups: Sequence[CacheGroup],
        attention: AttentionBackend | None,
        specs: Sequence[AttentionSpec | None],
        ops: KernelTable,
        max_context: int,
        device: TorchDevice,
    ) -> None:
        self.attention = attention
        self._max_context = max_context
        self._model = model
        self._groups = tuple(groups)
        self._specs = specs
        self._ops = ops
        self._parts: list[Part] = [self._part(group, device) for group in groups]
        self._parts.append(RowsPart(device))

    def _part(self, group: CacheGroup, device: TorchDevice) -> Part:
        if isinstance(group.pool, TorchKVPool) and self.attention is not None:
            return AttentionPart(self.attention, group.group)
        kind = PagesPart if isinstance(group.pool, TorchRowPool) else SlotsPart
        return kind(group.group, device)

    def plan(self, batch: StepBatch) -> list[Any]:
        """One plan per group, and one of the rows; host work only."""
        return [part.plan(batch) for part in self._parts]

    def bind(self, plans: Sequence[Any], reserved: Sequence[Any] | None = None) -> list[Any]:
        """The plans on the device, in fresh buffers or in those reserved."""
        places = [None] * len(plans) if reserved is None else reserved
        return [
            part.bind(plan, place)
            for part, plan, place in zip(self._parts, plans, places, strict=True)
        ]

    def bind_caches(self, plans: Sequence[Any]) -> None:
        """As `bind`, without the rows: for a step whose caches have a place of their own and whose
        kernels read nothing else."""
        for part, plan in zip(self._parts[:-1], plans, strict=False):
            part.bind(plan)

    def reserve(self, rows: int, tokens: int) -> list[Any]:
        """Buffers for plans of at most so many rows and tokens. Raises KernelError where the
        attention backend's plans have no fixed shape."""
        return [part.reserve(rows, tokens, self._max_context) for part in self._parts]

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        bound: Sequence[Any],
        images: ImageRows | None = None,
    ) -> Tensor:
        """(T,), (T,) int64 -> hidden states (T, width); with images also positions (3, T)."""
        given = {} if images is None else {"images": images}
        hidden: Tensor = self._model(token_ids, positions, self._step(bound), **given)
        return hidden

    def draw(self, hidden: Tensor, *asked: Any) -> Tensor:
        """The head, and the op `draw` over its logits: hidden (R, width) -> token ids (R,)."""
        tokens: Tensor = self._ops.draw(self._model.logits(hidden), *asked)
        return tokens

    def draft(
        self, hidden: Tensor, token_ids: Tensor, positions: Tensor, bound: Sequence[Any]
    ) -> Tensor:
        """The model's draft head, as `Model.draft`, over its own caches."""
        return self._model.draft(hidden, token_ids, positions, self._step(bound))

    def _step(self, bound: Sequence[Any]) -> BoundStep:
        *caches, rows = bound
        place = {
            site: (group, cache, index)
            for group, cache in zip(self._groups, caches, strict=True)
            for index, site in enumerate(group.sites)
        }
        return BoundStep(self._attend, place, rows)

    def _attend(
        self,
        site: int,
        group: CacheGroup,
        bound: Any,
        index: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
    ) -> Tensor:
        spec = self._specs[site]
        if self.attention is None or spec is None:
            raise TypeError(f"cache site {site} has no attention spec; its own op attends")
        if spec.sinks != (sinks is not None):
            raise ValueError(f"cache site {site}: its spec and its call disagree about sinks")
        result: Tensor = self.attention.run(bound, group.pool, index, q, k, v, spec, sinks)
        return result

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
        states = [g.group for g in self._groups if g.group.kind is KVKind.RECURRENT]
        paged = [g.group for g in self._groups if g.group.kind is not KVKind.RECURRENT]
        tables = {group.name: -(-most // group.page_size) for group in paged}
        return StepBatch(
            step=-1,
            row_ids=np.zeros(rows, np.int32),
            token_ids=np.zeros(sum(lengths), np.int32),
            query_start=np.concatenate(([0], np.cumsum(lengths))).astype(np.int32),
            context_lens=np.zeros(rows, np.int32),
            page_tables={name: np.zeros((rows, n), np.int32) for name, n in tables.items()},
            want=np.zeros(rows, np.uint8),
            sampling=no_sampling(rows),
            state_slots={group.name: np.full(rows, NO_SLOT, np.int32) for group in states},
        )
