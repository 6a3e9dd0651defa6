"""Storage of the cache groups that a model's own ops read and write: one vector per entry in pages
(latent, compressed, shared windows), and recurrent states in slots."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..interface_kernels import KernelTable
from ..interface_kv import CacheNeed, KVGroup, StateArray
from .device import TorchDevice
from .dtypes import DTYPES


class TorchRowPool:
    """Pages of one vector per entry: `data` (sites, pages, entries, dim). Not cleared: an op gives
    no weight, and no NaN a way out, to what its queries do not see."""

    def __init__(
        self, group: KVGroup, need: CacheNeed, sites: int, device: TorchDevice, ops: KernelTable
    ) -> None:
        self.group = group
        self.entries = need.entries(group.page_size)
        shape = (sites, group.pages, self.entries, need.head_dim)
        self.data = device.empty(shape, DTYPES[need.dtype])
        self._arrays = _Arrays([self.data], device, ops)

    def cache(self, site: int) -> Tensor:
        """(pages * entries, dim) of one site, to be written in place."""
        return self.data[site].flatten(0, 1)

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        self._arrays.copy(sources, targets)

    def export_page(self, page: int) -> bytes:
        """Canonical form, version 1: axes (site, entry, dim), little-endian, the pool's dtype."""
        return self._arrays.export(page)

    def import_page(self, page: int, data: bytes) -> None:
        self._arrays.restore(page, data, self.group.name)

    def page_view(self, site: int, page: int) -> Tensor:
        return self.data[site, page]


class TorchStatePool:
    """Slots of recurrent states: for each array of the state, (sites, slots, *shape)."""

    def __init__(
        self,
        group: KVGroup,
        states: Sequence[StateArray],
        sites: int,
        device: TorchDevice,
        ops: KernelTable,
    ) -> None:
        self.group = group
        self.data = [
            device.empty((sites, group.pages, *state.shape), DTYPES[state.dtype])
            for state in states
        ]
        self._arrays = _Arrays(self.data, device, ops)

    def arrays(self, site: int) -> tuple[Tensor, ...]:
        """(slots, *shape) each, of one site, to be written in place."""
        return tuple(array[site] for array in self.data)

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        self._arrays.copy(sources, targets)

    def export_page(self, page: int) -> bytes:
        """A slot in canonical form, version 1: array by array in the order that the model declares,
        axes (site, *shape), little-endian, each of its own dtype."""
        return self._arrays.export(page)

    def import_page(self, page: int, data: bytes) -> None:
        self._arrays.restore(page, data, self.group.name)


class _Arrays:
    """Arrays with pages, or slots, on axis 1."""

    def __init__(self, arrays: Sequence[Tensor], device: TorchDevice, ops: KernelTable) -> None:
        self._data = arrays
        self._device = device
        self._ops = ops

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """All sources are read before any target is written."""
        where = [
            self._device.to_device(np.asarray(pages, np.int64)) for pages in (sources, targets)
        ]
        for array in self._data:
            self._ops.page_copy(array, *where)

    def export(self, page: int) -> bytes:
        found = (array[:, page].contiguous().view(torch.uint8) for array in self._data)
        return b"".join(self._device.to_host(part).tobytes() for part in found)

    def restore(self, page: int, data: bytes, name: str) -> None:
        sizes = [array[:, page].nbytes for array in self._data]
        if len(data) != sum(sizes):
            raise ValueError(f"A page of group {name!r} has {sum(sizes)} bytes, got {len(data)}.")
        at = 0
        for array, size in zip(self._data, sizes, strict=True):
            raw = self._device.to_device(np.frombuffer(data, np.uint8, size, at).copy())
            array[:, page] = raw.view(array.dtype).view(array[:, page].shape)
            at += size
