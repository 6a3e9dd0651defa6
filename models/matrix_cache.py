"""Matrices in the form that kernels take, kept on disk between starts.

Packing a checkpoint's matrices costs a pass over all of them at every start, and quantising many
times that. The first start writes the packed form next to the checkpoint; later ones map it. The
file is in the safetensors format, is used only for the very checkpoint, settings and version that
it was made for, and may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .stale_matrices import Origin, prune

log = logging.getLogger("sixfold.models")

VERSION = 2
"""Of the packed forms: raised with any change to what a kernel's `prepare` makes."""

FOLDER = ".sixfold"
"""Beside the checkpoint; where that cannot be, `user_folder`."""

ALIGNMENT = 64

SPARE = 3
"""Nothing is kept unless this many times its size is free."""

STALE_S = 3600.0

_DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8,
    "U8": torch.uint8, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Parts:
    """A prepared matrix taken apart: what a kernel's `restore` needs to make it again."""

    facts: Mapping[str, Any]  # JSON
    tensors: Mapping[str, Tensor]


def fingerprint(files: list[Path], settings: Mapping[str, Any]) -> str:
    """Names a set of packed matrices: files by name, size and time of change, and `settings`."""
    seen = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(files)]
    text = json.dumps([VERSION, seen, settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def user_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sixfold"


def folder_for(checkpoint: Path) -> Path:
    """Where the packed matrices of a checkpoint (a directory or a file) are kept: beside it, but
    not within an installed package nor where nothing may be written."""
    beside = checkpoint if checkpoint.is_dir() else checkpoint.parent
    if "site-packages" in beside.parts or not os.access(beside, os.W_OK):
        return user_folder()
    return beside / FOLDER


def files_of(checkpoint: Path) -> list[Path]:
    """The files that a checkpoint's matrices come from."""
    if not checkpoint.is_dir():
        return [checkpoint]
    return [*checkpoint.glob("*.safetensors"), checkpoint / "config.json"]


class MatrixCache:
    """One file of packed matrices: found, and then read; or else made and saved."""

    def __init__(self, folder: Path, key: str, origin: Origin) -> None:
        self.path = folder / f"{key}.safetensors"
        self._key = key
        self._origin = origin
        self._data: mmap.mmap | None = None
        self._entries: dict[str, Any] = {}
        self._facts: dict[str, Any] = {}
        self._made: dict[str, Parts] = {}
        self._open()

    @property
    def found(self) -> bool:
        return self._data is not None

    def get(self, name: str) -> Parts | None:
        """The matrix under `name`, its tensors on the file's own pages; None when it is absent."""
        if self._data is None or name not in self._facts:
            return None
        prefix = f"{name}/"
        tensors = {
            entry.removeprefix(prefix): self._tensor(entry)
            for entry in self._entries
            if entry.startswith(prefix)
        }
        return Parts(self._facts[name], tensors)

    def put(self, name: str, parts: Parts) -> None:
        """Remember a matrix for `save`; its tensors are not copied."""
        self._made[name] = parts

    def save_aside(self) -> threading.Thread:
        """`save` on a thread of its own. A process that ends before it leaves a file that the next
        `save` removes; a failure costs the next start its head start and nothing else."""
        thread = threading.Thread(target=self._save_quietly, name="matrix-cache", daemon=True)
        thread.start()
        return thread

    def _save_quietly(self) -> None:
        if reason := self.save():
            log.warning("packed weights are not kept in %s: %s", self.path.parent, reason)

    def save(self) -> str:
        """Write what was put and drop it. Returns "" or why it could not be written."""
        header, at = {}, 0
        tensors = {}
        for name, parts in self._made.items():
            for part, tensor in parts.tensors.items():
                size = tensor.nbytes
                header[f"{name}/{part}"] = {
                    "dtype": _NAMES[tensor.dtype],
                    "shape": list(tensor.shape),
                    "data_offsets": [at, at + size],
                }
                tensors[f"{name}/{part}"] = tensor
                at += size
        facts = {name: parts.facts for name, parts in self._made.items()}
        self._made = {}
        metadata = {
            "key": self._key,
            "facts": json.dumps(facts),
            "checkpoint": self._origin.checkpoint,
            "state": self._origin.state,
        }
        text = json.dumps({"__metadata__": metadata, **header})
        # Data begin at a multiple of ALIGNMENT, as do tensors whose sizes are multiples of it.
        raw = text.encode().ljust(-(-(len(text) + 8) // ALIGNMENT) * ALIGNMENT - 8)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(self.path.parent).free < SPARE * at:
                return "the disk is almost full"
            for left in self.path.parent.glob("*.part"):
                # A younger one may be another process's, at work on it now.
                if time.time() - left.stat().st_mtime > STALE_S:
                    left.unlink(missing_ok=True)
            with tempfile.NamedTemporaryFile(
                dir=self.path.parent, suffix=".part", delete=False
            ) as file:
                file.write(len(raw).to_bytes(8, "little") + raw)
                for tensor in tensors.values():
                    file.write(tensor.contiguous().view(torch.uint8).numpy().data)
            os.replace(file.name, self.path)
            for stale in prune(self.path.parent, self._origin):
                log.info("deleted %s: its checkpoint or this version has changed", stale)
        except OSError as error:
            return str(error.strerror or error)
        return ""

    def _open(self) -> None:
        """Map the file if it is whole and made for this key; anything else is as if absent."""
        try:
            with self.path.open("rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            size = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + size])
            metadata = header.pop("__metadata__")
            end = max((e["data_offsets"][1] for e in header.values()), default=0)
            if metadata["key"] != self._key or 8 + size + end != len(data):
                return
            self._facts = json.loads(metadata["facts"])
        except (OSError, ValueError, KeyError, TypeError):
            return
        self._data, self._entries, self._start = data, header, 8 + size

    def _tensor(self, entry: str) -> Tensor:
        stored = self._entries[entry]
        dtype = _DTYPES[stored["dtype"]]
        first, last = stored["data_offsets"]
        count = (last - first) // dtype.itemsize
        if not count:
            return torch.empty(stored["shape"], dtype=dtype)
        flat = torch.frombuffer(self._data, dtype=dtype, count=count, offset=self._start + first)
        return flat.view(stored["shape"])
