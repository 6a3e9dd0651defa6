"""What a step's layers are given of their cache groups: on the host a plan, on the device the same
in buffers, fresh or reserved. One class per way of storing a group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...models.base import Pages, State
from ..interface_attention import AttentionBackend
from ..interface_kv import KVGroup
from ..interface_step import StepBatch
from .device import TorchDevice
from .pools import TorchKVPool
from .site_pools import TorchRowPool, TorchStatePool

I32 = NDArray[np.int32]
Pool = TorchKVPool | TorchRowPool | TorchStatePool

NO_SLOT = -1
"""In place of a slot: a row that is padding, which changes no state."""


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """A cache group as the runtime uses it: its sites in the model's order."""

    group: KVGroup
    pool: Pool
    sites: tuple[int, ...]


class Part(Protocol):
    """Of a step, what one cache group needs; the same life as of an attention backend's plan."""

    def plan(self, batch: StepBatch) -> Any: ...

    def reserve(self, rows: int, tokens: int, longest: int) -> Any: ...

    def bind(self, plan: Any, reserved: Any = None) -> Any: ...


class AttentionPart:
    def __init__(self, backend: AttentionBackend, group: KVGroup) -> None:
        self._backend = backend
        self._group = group

    def plan(self, batch: StepBatch) -> Any:
        return self._backend.plan(batch, self._group)

    def reserve(self, rows: int, tokens: int, longest: int) -> Any:
        return self._backend.reserve(self._group, rows, tokens, longest)

    def bind(self, plan: Any, reserved: Any = None) -> Any:
        return self._backend.bind(plan) if reserved is None else self._backend.bind(plan, reserved)


class PagesPart:
    """The page table (R, P) int32."""

    def __init__(self, group: KVGroup, device: TorchDevice) -> None:
        self._group = group
        self._device = device

    def plan(self, batch: StepBatch) -> I32:
        return batch.page_tables[self._group.name]

    def reserve(self, rows: int, tokens: int, longest: int) -> Tensor:
        return self._device.empty((rows, -(-longest // self._group.page_size)), torch.int32).zero_()

    def bind(self, plan: I32, reserved: Tensor | None = None) -> Tensor:
        table = self._device.to_device(np.ascontiguousarray(plan))
        if reserved is None:
            return table
        reserved.zero_()  # ops may look at pages that a row does not have
        reserved[: len(table), : table.shape[1]].copy_(table)
        return reserved


class SlotsPart:
    """The slot of each row, (R,) int32."""

    def __init__(self, group: KVGroup, device: TorchDevice) -> None:
        self._group = group
        self._device = device

    def plan(self, batch: StepBatch) -> I32:
        return batch.state_slots[self._group.name]

    def reserve(self, rows: int, tokens: int, longest: int) -> Tensor:
        return self._device.empty((rows,), torch.int32).fill_(NO_SLOT)

    def bind(self, plan: I32, reserved: Tensor | None = None) -> Tensor:
        slots = self._device.to_device(plan)
        if reserved is None:
            return slots
        reserved[len(slots) :].fill_(NO_SLOT)
        reserved[: len(slots)].copy_(slots)
        return reserved


class RowsPart:
    """Where rows begin, (R+1,), and what is before them, (R,); int32. Rows that reserved buffers
    have too many have one token each and no context."""

    def __init__(self, device: TorchDevice) -> None:
        self._device = device

    def plan(self, batch: StepBatch) -> tuple[I32, I32]:
        return batch.query_start, batch.context_lens

    def reserve(self, rows: int, tokens: int, longest: int) -> tuple[Tensor, Tensor]:
        start, context = (self._device.empty((n,), torch.int32) for n in (rows + 1, rows))
        return start, context

    def bind(
        self, plan: tuple[I32, I32], reserved: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        start, context = plan
        if reserved is not None:
            more = len(reserved[1]) - len(context)
            start = np.concatenate((start, start[-1] + 1 + np.arange(more, dtype=np.int32)))
            context = np.pad(context, (0, more))
        bound = self._device.to_device(start), self._device.to_device(context)
        if reserved is None:
            return bound
        for place, value in zip(reserved, bound, strict=True):
            place.copy_(value)
        return reserved


class BoundStep:
    """The `Step` that a model's forward is given: its parts bound, group by group, rows last."""

    def __init__(self, attend: Any, place: dict[int, tuple[CacheGroup, Any, int]], rows: Any):
        self._attend = attend
        self._place = place
        self.query_start, self.context_lens = rows

    def __call__(
        self, site: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None
    ) -> Tensor:
        result: Tensor = self._attend(site, *self._place[site], q, k, v, sinks)
        return result

    def state(self, site: int) -> State:
        group, slots, place = self._place[site]
        if not isinstance(group.pool, TorchStatePool):
            raise TypeError(f"cache site {site} keeps {group.group.kind.value} pages, not a state")
        return State(group.pool.arrays(place), slots)

    def pages(self, site: int) -> Pages:
        group, table, place = self._place[site]
        pool = group.pool
        if not isinstance(pool, TorchRowPool):
            raise TypeError(f"cache site {site} ({group.group.kind.value}) has no vectors in pages")
        return Pages(pool.cache(place), table, group.group.page_size, pool.entries)
