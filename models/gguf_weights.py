"""Weights from a GGUF file: dequantised in blocks of rows straight into the model's tensors."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from ..common.checkpoint.gguf_weights import GGUFWeights as Rows
from ..common.checkpoint.quantised_rows import QuantisedRows

_BLOCK_ELEMENTS = 1 << 18  # float32 blocks of 1 MiB stay in the cache
_THREADS = 4


class GGUFWeights:
    """The same access as `SafetensorsWeights`; nothing can be used without conversion."""

    def __init__(self, path: Path) -> None:
        self._rows = Rows(path)
        self.norm_offset = self._rows.norm_offset
        self._threads = min(_THREADS, torch.get_num_threads())

    def names(self) -> Sequence[str]:
        return self._rows.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._rows.shape(name)

    def where(self, name: str) -> str:
        return f"{self._rows.path}: tensor {self._rows.stored_name(name)!r}"

    def mapped(self, name: str, dtype: torch.dtype) -> Tensor | None:
        return None

    def scheme(self, name: str) -> str:
        return self._rows.scheme(name)

    def is_spare(self, name: str) -> bool:
        return False

    def quantised(self, name: str) -> QuantisedRows:
        return self._rows.quantised_rows(name)

    def copy_into(self, name: str, target: Tensor) -> None:
        """Fill `target` (same shape, any dtype, on the CPU)."""
        rows = target.view(-1, target.shape[-1])
        unit = self._rows.row_step(name)
        step = max(_BLOCK_ELEMENTS // rows.shape[1] // unit, 1) * unit

        def fill(start: int) -> None:
            stop = min(start + step, len(rows))
            values = self._rows.read_rows(name, start, stop)
            rows[start:stop].copy_(torch.from_numpy(values))

        starts = range(0, len(rows), step)
        with ThreadPoolExecutor(min(self._threads, len(starts))) as pool:
            list(pool.map(fill, starts))
