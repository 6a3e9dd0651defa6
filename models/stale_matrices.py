"""Packed matrices that no start can use again: of files that have changed since, or of another
version of the packed forms."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Origin:
    """Which checkpoint a file of packed matrices was made from, and what it then was."""

    checkpoint: str  # its absolute path
    state: str  # its files by size and time, and the version of the packed forms


def origin_of(checkpoint: Path, files: list[Path], version: int) -> Origin:
    seen = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(files)]
    text = json.dumps([version, seen])
    return Origin(str(checkpoint.resolve()), hashlib.sha256(text.encode()).hexdigest()[:24])


def prune(folder: Path, origin: Origin) -> list[Path]:
    """Delete the files in `folder` that were made from an earlier state of the same checkpoint, and
    those of versions that did not say from what. Other settings of today's state stay. A process
    that has such a file mapped keeps its pages; one that writes has another name until it is done.
    """
    gone = []
    for path in sorted(folder.glob("*.safetensors")):
        found = _metadata(path)
        if "key" not in found or "facts" not in found:
            continue  # not ours
        named = found.get("checkpoint")
        if named is None or (named == origin.checkpoint and found.get("state") != origin.state):
            with contextlib.suppress(OSError):
                path.unlink()
                gone.append(path)
    return gone


def _metadata(path: Path) -> Mapping[str, str]:
    """Of a safetensors file; nothing where there is none to read."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > path.stat().st_size:
                return {}
            found = json.loads(file.read(size)).get("__metadata__", {})
    except (OSError, ValueError, AttributeError):
        return {}
    return found if isinstance(found, dict) else {}
