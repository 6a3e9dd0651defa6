"""Weights of a directory whose experts are MXFP4 stacks (GPT-OSS): `<name>_blocks` (experts, n,
k / 32, 16) and `<name>_scales` (experts, n, k / 32). By that name they are the matrix (experts, k,
n) that unquantised checkpoints hold: given as it is stored, or converted expert by expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..common.checkpoint.block_floats import MX_GROUP, Mxfp4Rows, StoredMatrix
from ..common.checkpoint.block_scaled import MXFP4
from ..common.checkpoint.safetensors_index import StoredTensor, read_array
from ..common.errors import CheckpointError
from .safetensors_weights import SafetensorsWeights

_BLOCKS, _SCALES = "_blocks", "_scales"


class Mxfp4Stacks(SafetensorsWeights):
    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._stacks: dict[str, tuple[StoredTensor, StoredTensor]] = {}
        for name in [name for name in self._tensors if name.endswith(_BLOCKS)]:
            stack = name.removesuffix(_BLOCKS)
            blocks, scales = self._tensors.pop(name), self._tensors.pop(stack + _SCALES, None)
            _check(blocks, scales)
            if scales is not None:
                self._stacks[stack] = blocks, scales

    def names(self) -> Sequence[str]:
        return [*super().names(), *self._stacks]

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._stacks:
            return super().shape(name)
        experts, rows, groups, _ = self._stacks[name][0].shape
        return experts, groups * MX_GROUP, rows

    def where(self, name: str) -> str:
        if name not in self._stacks:
            return super().where(name)
        blocks, _ = self._stacks[name]
        return f"{blocks.file}: tensor {blocks.name!r}"

    def mapped(self, name: str, dtype: torch.dtype) -> Tensor | None:
        return None if name in self._stacks else super().mapped(name, dtype)

    def scheme(self, name: str) -> str:
        return MXFP4 if name in self._stacks else super().scheme(name)

    def quantised(self, name: str) -> StoredMatrix:
        """Of a stack the experts' matrices (n, k) below each other."""
        if name not in self._stacks:
            return super().quantised(name)
        codes, scales = (read_array(part) for part in self._stacks[name])
        experts, n, groups = scales.shape
        return Mxfp4Rows(codes.reshape(experts * n, -1), scales.reshape(experts * n, groups))

    def copy_into(self, name: str, target: Tensor) -> None:
        if name not in self._stacks:
            super().copy_into(name, target)
            return
        for expert, place in enumerate(target.unbind(0)):
            codes, scales = (_of_expert(part, expert) for part in self._stacks[name])
            rows = Mxfp4Rows(codes.reshape(len(codes), -1), scales)
            place.copy_(torch.from_numpy(rows.values()).T)


def _check(blocks: StoredTensor, scales: StoredTensor | None) -> None:
    if scales is None:
        raise CheckpointError(f"{blocks.file}: tensor {blocks.name!r} has no scales beside it.")
    fits = len(blocks.shape) == 4 and blocks.shape[-1] == MX_GROUP // 2
    if not fits or scales.shape != blocks.shape[:3] or {blocks.dtype, scales.dtype} != {"U8"}:
        raise CheckpointError(
            f"{blocks.file}: tensors {blocks.name!r} {blocks.shape} and {scales.name!r} "
            f"{scales.shape} are no MXFP4 stack; asked for bytes (experts, n, groups, "
            f"{MX_GROUP // 2}) and (experts, n, groups)."
        )


def _of_expert(tensor: StoredTensor, expert: int) -> NDArray[np.uint8]:
    size = tensor.nbytes // tensor.shape[0]
    part = replace(
        tensor, shape=tensor.shape[1:], offset=tensor.offset + expert * size, nbytes=size
    )
    return read_array(part)
