"""Weights of a directory whose matrices are small floats with a scale per block: given as they are
stored, or converted some rows at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..common.checkpoint.block_floats import StoredMatrix
from ..common.checkpoint.block_scaled import BlockMatrix, find_blocks
from .safetensors_weights import SafetensorsWeights

_BLOCK_ELEMENTS = 1 << 20


class BlockWeights(SafetensorsWeights):
    """A matrix goes by the name of its weight; its scales are no tensors of their own."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._matrices: dict[str, BlockMatrix] = find_blocks(self._tensors)
        self._scales = {matrix.scale.name for matrix in self._matrices.values()}

    def names(self) -> Sequence[str]:
        return [name for name in super().names() if name not in self._scales]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._matrices[name].shape if name in self._matrices else super().shape(name)

    def mapped(self, name: str, dtype: torch.dtype) -> Tensor | None:
        return None if name in self._matrices else super().mapped(name, dtype)

    def scheme(self, name: str) -> str:
        return self._matrices[name].scheme if name in self._matrices else super().scheme(name)

    def quantised(self, name: str) -> StoredMatrix:
        if name in self._matrices:
            return self._matrices[name].read()
        return super().quantised(name)

    def copy_into(self, name: str, target: Tensor) -> None:
        matrix = self._matrices.get(name)
        if matrix is None:
            super().copy_into(name, target)
            return
        rows, columns = matrix.shape
        together = matrix.rows_at_once
        step = max(_BLOCK_ELEMENTS // (max(columns, 1) * together), 1) * together
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            target[start:stop].copy_(torch.from_numpy(matrix.rows(start, stop).values()))
