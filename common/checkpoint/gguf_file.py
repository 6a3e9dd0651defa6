"""The GGUF container: header, metadata and tensor table, read without touching the weights.

Follows the public format description (ggml, docs/gguf.md), versions 2 and 3, little-endian. Long
arrays (the vocabulary) are only measured when the file is opened and decoded when asked for.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CheckpointError
from .gguf_types import SUPPORTED, supported_names, type_name

_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_MAX_DIMS = 4


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One entry of the tensor table. `shape` has the outermost axis first."""

    name: str
    shape: tuple[int, ...]
    kind: int  # ggml type number
    offset: int  # bytes from the start of the file
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Array:
    """Where an array lies in the file: decoded on demand."""

    element: int
    count: int
    offset: int


class GGUFFile:
    """An open GGUF file. Raises CheckpointError when the file is not one, or is cut short."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._data = _map_file(path)
        self._at = 0
        self._decoded: dict[str, list[str]] = {}
        try:
            self._values, self.tensors = self._read_header()
        except (struct.error, UnicodeDecodeError, IndexError, OverflowError):
            raise CheckpointError(
                f"{path}: the header is cut short or damaged at byte {self._at} of "
                f"{len(self._data)}; download the file again."
            ) from None
        self._check_tensors()

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def get(self, key: str, default: Any = None) -> Any:
        """A metadata value; arrays become lists (strings) or numpy arrays (numbers)."""
        value = self._values.get(key, default)
        return self._decode(value) if isinstance(value, _Array) else value

    def strings(self, key: str) -> list[str]:
        """An array of strings; empty when absent. Raises CheckpointError for another type."""
        if key not in self._decoded:
            value = self.get(key, [])
            if not isinstance(value, list):
                raise CheckpointError(f"{self.path}: field {key!r} must be an array of strings.")
            self._decoded[key] = value
        return list(self._decoded[key])

    def numbers(self, key: str, count: int) -> NDArray[Any] | None:
        """An array of `count` numbers; None when absent. Raises CheckpointError otherwise."""
        value = self.get(key)
        if value is not None and not (isinstance(value, np.ndarray) and len(value) == count):
            raise CheckpointError(
                f"{self.path}: field {key!r} must be an array of {count} numbers."
            )
        return value

    def scalars(self) -> Mapping[str, Any]:
        """All metadata that is not an array."""
        return {k: v for k, v in self._values.items() if not isinstance(v, _Array)}

    def read_bytes(self, tensor: GGUFTensor) -> bytes:
        """The whole of a (small) tensor as stored."""
        return self._data[tensor.offset : tensor.offset + tensor.nbytes]

    # ---- parsing

    def _read_header(self) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
        magic = self._data[:4]
        if magic != _MAGIC:
            raise CheckpointError(f"{self.path}: not a GGUF file (it begins with {magic!r}).")
        self._at = 4
        version = self._scalar("I")
        if version not in (2, 3):
            raise CheckpointError(
                f"{self.path}: GGUF version {version} is not supported; supported: 2 and 3 "
                "(little-endian)."
            )
        tensor_count, value_count = self._scalar("Q"), self._scalar("Q")
        values: dict[str, Any] = {}
        for _ in range(value_count):
            key = self._string()
            values[key] = self._value(self._scalar("I"))
        entries = [self._tensor_entry() for _ in range(tensor_count)]
        alignment = values.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise CheckpointError(f"{self.path}: field 'general.alignment' is {alignment!r}.")
        start = -(-self._at // alignment) * alignment
        return values, {
            name: GGUFTensor(name, shape, kind, start + offset, _stored_bytes(shape, kind))
            for name, shape, kind, offset in entries
        }

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            element, count = self._scalar("I"), self._scalar("Q")
            array = _Array(element, count, self._at)
            self._skip(array)
            return array
        if kind not in _SCALARS:
            raise CheckpointError(
                f"{self.path}: unknown metadata type {kind} at byte {self._at}; the file is "
                "damaged or newer than the format this version reads."
            )
        return self._scalar(_SCALARS[kind])

    def _tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        dims = self._scalar("I")
        if dims > _MAX_DIMS:
            raise struct.error("more axes than the format allows")
        shape = tuple(self._scalar("Q") for _ in range(dims))[::-1]
        return name, shape, self._scalar("I"), self._scalar("Q")

    def _skip(self, array: _Array) -> None:
        if array.element == _STRING:
            data, at, read = self._data, self._at, struct.Struct("<Q").unpack_from
            for _ in range(array.count):
                at += 8 + read(data, at)[0]
            self._at = at
        elif array.element in _SCALARS:
            self._at += array.count * struct.calcsize("<" + _SCALARS[array.element])
        else:
            raise struct.error("arrays of this type are not part of the format")

    def _decode(self, array: _Array) -> Any:
        if array.element != _STRING:
            dtype = np.dtype(_SCALARS[array.element]).newbyteorder("<")
            return np.frombuffer(self._data, dtype, array.count, array.offset).copy()
        data, at, read = self._data, array.offset, struct.Struct("<Q").unpack_from
        strings = []
        for _ in range(array.count):
            end = at + 8 + read(data, at)[0]
            strings.append(str(data[at + 8 : end], "utf-8", "replace"))
            at = end
        return strings

    def _scalar(self, code: str) -> Any:
        value = struct.unpack_from("<" + code, self._data, self._at)[0]
        self._at += struct.calcsize("<" + code)
        return value

    def _string(self) -> str:
        length = self._scalar("Q")
        if self._at + length > len(self._data):
            raise struct.error("string beyond the end of the file")
        text = str(self._data[self._at : self._at + length], "utf-8")
        self._at += length
        return text

    def _check_tensors(self) -> None:
        for tensor in self.tensors.values():
            if tensor.kind not in SUPPORTED:
                raise CheckpointError(
                    f"{self.path}: tensor {tensor.name!r} is stored as {type_name(tensor.kind)}, "
                    f"which is not supported; supported: {supported_names()}."
                )
            if tensor.shape and tensor.shape[-1] % SUPPORTED[tensor.kind].elements:
                raise CheckpointError(
                    f"{self.path}: tensor {tensor.name!r} of shape {tensor.shape} cannot be "
                    f"stored as {type_name(tensor.kind)}; the file is damaged."
                )
            if tensor.offset + tensor.nbytes > len(self._data):
                raise CheckpointError(
                    f"{self.path}: the file ends inside tensor {tensor.name!r} ({len(self._data)} "
                    f"bytes, {tensor.offset + tensor.nbytes} needed); download it again."
                )


def open_gguf(path: Path) -> GGUFFile:
    """As GGUFFile(path); the last one is kept, because configuration, tokenizer and weights each
    ask for it and a header lists the whole vocabulary. A file that has changed is read anew."""
    try:
        stat = path.stat()
    except OSError:
        return GGUFFile(path)  # raises with its own sentence
    return _open(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=1)
def _open(path: Path, modified: int, size: int) -> GGUFFile:
    return GGUFFile(path)


def _map_file(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:
        raise CheckpointError(f"{path}: the file is empty; download it again.") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from None


def _stored_bytes(shape: tuple[int, ...], kind: int) -> int:
    elements = 1
    for size in shape:
        elements *= size
    block = SUPPORTED.get(kind)
    return elements // block.elements * block.nbytes if block else 0
