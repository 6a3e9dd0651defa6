"""The tensor table of a directory's safetensors files, read and checked without the weights; single
tensors as numpy arrays.

Format: eight bytes little-endian header length, a JSON header, then the data (safetensors 0.x).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CheckpointError
from .hf_directory import read_object

ITEM_BYTES = {
    "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I8": 1, "U8": 1, "F8_E4M3": 1, "F8_E8M0": 1,
}  # fmt: skip
"""Supported storage types and their bytes per element."""

_NUMPY = {
    "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I8": "i1", "U8": "u1",
    "F8_E4M3": "u1", "F8_E8M0": "u1",
}  # fmt: skip

_INDEX = "model.safetensors.index.json"
_MAX_HEADER = 100_000_000


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor in a file; `offset` counts from the start of the file."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_tables(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of the directory by its name. Raises CheckpointError naming file and tensor."""
    index = read_object(directory / _INDEX)
    if index is None:
        files = _unindexed(directory)
        return {name: t for file in files for name, t in read_header(file).items()}
    places = index.get("weight_map")
    if not isinstance(places, Mapping):
        raise CheckpointError(f"{directory / _INDEX}: field 'weight_map' is missing.")
    shards = {}
    for file in sorted(set(map(str, places.values()))):
        if not (directory / file).is_file():
            raise CheckpointError(
                f"{directory}: shard {file} is missing, which {_INDEX} lists; download it."
            )
        shards[file] = read_header(directory / file)
    for name, file in places.items():
        if name not in shards[file]:
            raise CheckpointError(f"{directory / file}: tensor {name!r} is missing.")
    return {name: shards[file][name] for name, file in places.items()}


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensor table of one file."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise CheckpointError(
                f"{file}: the header is cut short or this is no safetensors file ({size} bytes); "
                "download it again."
            )
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        entries = {n: e for n, e in header.items() if n != "__metadata__"}
        return {name: _entry(file, name, e, 8 + length, size) for name, e in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file}: the header is damaged ({error}); download it again."
        ) from None


def read_array(tensor: StoredTensor) -> NDArray[Any]:
    """A whole tensor of a supported type; floats become float32, floats of a byte stay bytes."""
    count = tensor.nbytes // ITEM_BYTES[tensor.dtype]
    kind = np.dtype(_NUMPY[tensor.dtype])
    raw = np.fromfile(tensor.file, kind, count, offset=tensor.offset).reshape(tensor.shape)
    if tensor.dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32) if tensor.dtype == "F16" else raw


def _entry(file: Path, name: str, entry: Mapping[str, Any], start: int, size: int) -> StoredTensor:
    begin, end = entry["data_offsets"]
    shape = tuple(int(n) for n in entry["shape"])
    dtype = entry["dtype"]
    tensor = StoredTensor(name, file, dtype, shape, start + begin, end - begin)
    if start + end > size:
        raise CheckpointError(
            f"{file}: the file ends inside tensor {name!r} ({size} bytes, {start + end} needed); "
            "download it again."
        )
    known = ITEM_BYTES.get(dtype)
    if known is not None and math.prod(shape) * known != tensor.nbytes:
        raise CheckpointError(
            f"{file}: tensor {name!r} of shape {shape} and type {dtype} does not fill its "
            f"{tensor.nbytes} bytes; the file is damaged."
        )
    return tensor


def _unindexed(directory: Path) -> list[Path]:
    single = directory / "model.safetensors"
    if single.is_file():
        return [single]
    found = sorted(directory.glob("*.safetensors"))
    if found:
        return found
    others = [p.name for p in directory.glob("*.bin")] + [p.name for p in directory.glob("*.pth")]
    hint = f" ({others[0]} is a pickle, which is never loaded)" if others else ""
    raise CheckpointError(
        f"{directory}: no *.safetensors file{hint}; supported: safetensors in float32, float16 or "
        "bfloat16, and GGUF."
    )
