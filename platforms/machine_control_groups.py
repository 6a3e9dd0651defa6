"""The control groups that this process is in: where the limits of a container are written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from .machine_source import Source


def control_groups(source: Source, controller: str) -> Iterator[str]:
    """Folders of this process's control group and its ancestors, versions 2 and 1."""
    for line in source.text("/proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if number == "0":
            base = "/sys/fs/cgroup"
        elif controller in names.split(","):
            base = f"/sys/fs/cgroup/{names}"
        else:
            continue
        # Inside a container the path may be the host's: then only the root of the mount exists.
        for part in (PurePosixPath(path), *PurePosixPath(path).parents):
            yield f"{base}{part}".rstrip("/")
