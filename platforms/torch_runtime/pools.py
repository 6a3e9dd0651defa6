"""Paged storage of keys and values, one tensor per cache group, in the order of axes that its
attention backend reads best. A page of one layer is one contiguous block; all layers share one
tensor, so copying pages is one operation per group.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..interface_kernels import KernelTable
from ..interface_kv import KVGroup, KVLayout
from .device import TorchDevice
from .dtypes import KV_DTYPES

TOKENS = ("layer", "page", "token", "kv", "head", "dim")


class TorchKVPool:
    """KVPool of one group. Memory is reserved and not cleared: see `clear`. `tokens` is `data` with
    its axes in the order of TOKENS."""

    def __init__(
        self, group: KVGroup, layout: KVLayout, device: TorchDevice, ops: KernelTable
    ) -> None:
        self._group = group
        self._layout = layout
        self._device = device
        self._ops = ops
        if layout.axes[:2] != ("layer", "page"):
            raise ValueError(f"pages of a layer must lie together, not {layout.axes}")
        self.data = device.empty(layout.shape, KV_DTYPES[layout.dtype])
        self.tokens = self.data.permute([layout.axes.index(axis) for axis in TOKENS])
        layers, pages, size, _, heads, dim = self.tokens.shape
        self._by_slot: list[tuple[Tensor, Tensor]] | None = None
        if layout.axes == TOKENS:
            # Views by slot, made once: a step then indexes plain lists.
            slots = self.data.view(layers, pages * size, 2, heads, dim)
            self._by_slot = [(slots[layer, :, 0], slots[layer, :, 1]) for layer in range(layers)]
        self._blocks = [self.data[layer].view(pages, -1) for layer in range(layers)]

    @property
    def group(self) -> KVGroup:
        return self._group

    @property
    def layout(self) -> KVLayout:
        return self._layout

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """slots (T,) int64 on the device; k, v (T, heads, dim)."""
        if self._by_slot is not None:
            self._ops.kv_write(*self._by_slot[layer], slots, k, v)
            return
        size = self.tokens.shape[2]
        pages, offsets = slots // size, slots % size
        self.tokens[layer, pages, offsets, 0] = k
        self.tokens[layer, pages, offsets, 1] = v

    def gather(self, layer: int, pages: Tensor | slice) -> Tensor:
        """pages (N,) int64 on the device -> (N * page_size, 2, heads, dim), a copy; or a slice of
        neighbouring pages -> a view. For pools whose axes are TOKENS."""
        _, _, _, _, heads, dim = self._layout.shape
        blocks = self._blocks[layer]
        chosen = blocks[pages] if isinstance(pages, slice) else blocks.index_select(0, pages)
        return chosen.view(-1, 2, heads, dim)

    def clear(self, layer: int, pages: Tensor) -> None:
        """Zero pages. Attention pads to whole pages and gives the padding weight 0; a NaN left by
        whoever had the page before would survive that, so a page is cleared when it is begun."""
        self._blocks[layer].index_fill_(0, pages, 0.0)

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """All sources are read before any target is written."""
        where = [
            self._device.to_device(np.asarray(pages, np.int64)) for pages in (sources, targets)
        ]
        self._ops.page_copy(self.data, *where)

    def export_page(self, page: int) -> bytes:
        canonical = self.tokens[:, page].permute(0, 2, 1, 3, 4).contiguous()
        return bytes(self._device.to_host(canonical.view(torch.uint8)).tobytes())

    def import_page(self, page: int, data: bytes) -> None:
        layers, _, size, _, heads, dim = self.tokens.shape
        shape = (layers, 2, size, heads, dim)
        dtype = self.data.dtype
        need = int(np.prod(shape)) * dtype.itemsize
        if len(data) != need:
            raise ValueError(
                f"A page of group {self._group.name!r} has {need} bytes, got {len(data)}."
            )
        raw = self._device.to_device(np.frombuffer(data, np.uint8).copy())
        self.tokens[:, page] = raw.view(dtype).view(shape).permute(0, 2, 1, 3, 4)

    def page_view(self, layer: int, page: int) -> Tensor:
        return self.data[layer, page]
