"""Weights from safetensors files: mapped without a copy where the dtype fits, else converted."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..common.checkpoint.block_floats import StoredMatrix
from ..common.checkpoint.safetensors_index import ITEM_BYTES, StoredTensor, read_tables
from ..common.errors import CheckpointError

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES = {**_FLOATS, "I64": torch.int64, "I32": torch.int32}
_SCHEMES = {"F16": "float16", "BF16": "bfloat16"}
_BLOCK_BYTES = 4 << 20


class SafetensorsWeights:
    """Tensors of a directory by their names there."""

    norm_offset = 0.0

    def __init__(self, directory: Path) -> None:
        self._tensors = read_tables(directory)
        self._maps: dict[Path, mmap.mmap] = {}

    def names(self) -> Sequence[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def where(self, name: str) -> str:
        """File and tensor, for error messages."""
        return f"{self._tensors[name].file}: tensor {name!r}"

    def mapped(self, name: str, dtype: torch.dtype) -> Tensor | None:
        """The tensor on the file's own pages, private to this process; None when it would have to
        be converted. The mapping lives as long as any tensor on it."""
        stored = self._tensors[name]
        item = ITEM_BYTES.get(stored.dtype)
        if _DTYPES.get(stored.dtype) != dtype or not item or stored.offset % item:
            return None
        data = self._maps.get(stored.file)
        if data is None:
            with stored.file.open("rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            self._maps[stored.file] = data
        count = stored.nbytes // item
        if not count:
            return torch.empty(stored.shape, dtype=dtype)
        flat = torch.frombuffer(data, dtype=dtype, count=count, offset=stored.offset)
        return flat.reshape(stored.shape)

    def scheme(self, name: str) -> str:
        """ "bfloat16" or "float16" for a matrix in it, else "": nothing is stored quantised."""
        stored = self._tensors[name]
        return _SCHEMES.get(stored.dtype, "") if len(stored.shape) > 1 else ""

    def is_spare(self, name: str) -> bool:
        return False

    def quantised(self, name: str) -> StoredMatrix:
        raise CheckpointError(f"{self.where(name)} is not quantised.")

    def copy_into(self, name: str, target: Tensor) -> None:
        """Fill `target` (same shape, any dtype, on the CPU) in blocks read from the file."""
        stored = self._tensors[name]
        if stored.dtype not in _DTYPES:
            raise CheckpointError(
                f"{self.where(name)} is stored as {stored.dtype}, which is not supported; "
                f"supported: {' '.join(_DTYPES)}."
            )
        if not stored.nbytes:
            return
        if target.is_contiguous():
            self._copy_blocks(stored, target.view(-1))
        else:
            for part, row in enumerate(target):
                self._copy_blocks(stored, row.view(-1), part * row.numel())

    def _copy_blocks(self, stored: StoredTensor, target: Tensor, start: int = 0) -> None:
        item = ITEM_BYTES[stored.dtype]
        step = _BLOCK_BYTES // item
        buffer = np.empty(min(step, len(target)) * item, np.uint8)
        with stored.file.open("rb", buffering=0) as file:
            file.seek(stored.offset + start * item)
            for at in range(0, len(target), step):
                part = target[at : at + step]
                raw = buffer[: len(part) * item]
                if file.readinto(raw.data) != raw.nbytes:
                    raise CheckpointError(f"{self.where(stored.name)} is cut short.")
                part.copy_(torch.from_numpy(raw).view(_DTYPES[stored.dtype]))
