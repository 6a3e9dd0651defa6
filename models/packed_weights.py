"""Weights of a directory whose matrices are packed (GPTQ, AWQ, compressed-tensors): given as they
are stored, or converted one matrix at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..common.checkpoint.block_floats import StoredMatrix
from ..common.checkpoint.packed_matrices import PackedMatrix, find_packed
from ..common.checkpoint.packed_schemes import PackedScheme
from ..common.checkpoint.safetensors_index import read_array
from .safetensors_weights import SafetensorsWeights

_BLOCK_ELEMENTS = 1 << 20


class PackedWeights(SafetensorsWeights):
    """A packed matrix goes by the name of the module's weight, whatever its parts are called."""

    def __init__(self, directory: Path, scheme: PackedScheme) -> None:
        super().__init__(directory)
        packed = find_packed(self._tensors, scheme)
        self._packed: dict[str, PackedMatrix] = {f"{m}.weight": p for m, p in packed.items()}
        self._parts = {t.name for matrix in packed.values() for t in matrix.tensors.values()}

    def names(self) -> Sequence[str]:
        return [*(name for name in super().names() if name not in self._parts), *self._packed]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._packed[name].shape if name in self._packed else super().shape(name)

    def where(self, name: str) -> str:
        return self._packed[name].where if name in self._packed else super().where(name)

    def mapped(self, name: str, dtype: torch.dtype) -> Tensor | None:
        return None if name in self._packed else super().mapped(name, dtype)

    def scheme(self, name: str) -> str:
        return self._packed[name].scheme.name if name in self._packed else super().scheme(name)

    def quantised(self, name: str) -> StoredMatrix:
        if name in self._packed:
            return self._packed[name].quantised_rows()
        return super().quantised(name)

    def is_spare(self, name: str) -> bool:
        """Packers wrote a bias of zeros beside every matrix, also where the model has none."""
        module, _, last = name.rpartition(".")
        if last != "bias" or f"{module}.weight" not in self._packed:
            return False
        return not read_array(self._tensors[name]).any()

    def copy_into(self, name: str, target: Tensor) -> None:
        if name in self._packed:
            self._convert(self._packed[name], target)
        else:
            super().copy_into(name, target)

    def _convert(self, packed: PackedMatrix, target: Tensor) -> None:
        matrix = packed.read()
        step = max(_BLOCK_ELEMENTS // target.shape[1], 1)
        for start in range(0, len(target), step):
            stop = min(start + step, len(target))
            target[start:stop].copy_(torch.from_numpy(matrix.values(start, stop)))
