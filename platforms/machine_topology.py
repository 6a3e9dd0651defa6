"""The CPUs that this process may use: which share a core, which are near which memory."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .machine_control_groups import control_groups
from .machine_source import Source

CPUS = "/sys/devices/system/cpu"
NODES = "/sys/devices/system/node"


@dataclass(frozen=True, slots=True)
class LogicalCpu:
    number: int
    core: tuple[str, str]  # package and core; equal for the hardware threads of one core
    node: int = 0  # NUMA node


@dataclass(frozen=True, slots=True)
class Topology:
    """Of the CPUs that are online and in this process's affinity mask, in order of number."""

    cpus: tuple[LogicalCpu, ...]
    quota: float = math.inf  # cores' worth of time that the control groups allow
    known: bool = True  # False: nothing tells which CPUs share a core, so each counts as one

    @property
    def whole_quota(self) -> int | None:
        """Threads that never wait for the quota: rounded down, at least one. None: no quota."""
        return None if math.isinf(self.quota) else max(1, math.floor(self.quota))

    def first_of_each_core(self) -> list[LogicalCpu]:
        return list({cpu.core: cpu for cpu in reversed(self.cpus)}.values())[::-1]


def without_details(cores: int) -> Topology:
    """So many cores of which nothing else is known."""
    return Topology(tuple(LogicalCpu(i, ("", str(i))) for i in range(cores)), known=False)


def topology(source: Source, allowed: Iterable[int]) -> Topology:
    """`allowed`: the affinity mask. What /sys does not tell (a container, another system) is
    taken as one core per CPU and one node."""
    online = list(_ranges(source.text(f"{CPUS}/online")))
    numbers = sorted(set(allowed))
    # A recorded mask may name CPUs that were taken offline; a running kernel's does not.
    numbers = [n for n in numbers if any(n in part for part in online)] or numbers
    cores = [_core(source, number) for number in numbers]
    nodes = _nodes(source)
    cpus = (
        LogicalCpu(number, core or ("", str(number)), _node(number, nodes))
        for number, core in zip(numbers, cores, strict=True)
    )
    return Topology(tuple(cpus), _quota(source), bool(cores) and None not in cores)


def usable_cpus() -> list[int]:
    """The affinity mask of the calling thread; all CPUs where the system has no such masks."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _core(source: Source, cpu: int) -> tuple[str, str] | None:
    names = ("physical_package_id", "core_id", "thread_siblings_list")
    package, core, siblings = (source.text(f"{CPUS}/cpu{cpu}/topology/{name}") for name in names)
    # Some virtual machines number all their cores 0; the lists of siblings are right there too.
    shared = siblings or core
    return (package, shared) if shared else None


def _nodes(source: Source) -> dict[int, list[range]]:
    """NUMA node -> its CPUs; nodes without memory or CPUs have an empty list."""
    found = {}
    for file in source.glob(f"{NODES}/node[0-9]*/cpulist"):
        number = file.split("/")[-2].removeprefix("node")
        if number.isdigit():
            found[int(number)] = list(_ranges(source.text(file)))
    return found


def _node(cpu: int, nodes: dict[int, list[range]]) -> int:
    return next((n for n, parts in nodes.items() if any(cpu in part for part in parts)), 0)


def _ranges(text: str) -> Iterator[range]:
    """The kernel's lists: "0-3,8". Anything else is left out."""
    for part in text.split(","):
        if match := re.fullmatch(r"\s*([0-9]{1,9})(?:-([0-9]{1,9}))?\s*", part):
            yield range(int(match[1]), int(match[2] or match[1]) + 1)


def _quota(source: Source) -> float:
    shares = [math.inf]
    for folder in control_groups(source, "cpu"):
        quota, _, period = source.text(f"{folder}/cpu.max").partition(" ")
        if not quota:
            quota = source.text(f"{folder}/cpu.cfs_quota_us")
            period = source.text(f"{folder}/cpu.cfs_period_us")
        if quota.isdecimal() and period.isdecimal() and int(quota) > 0 and int(period) > 0:
            shares.append(int(quota) / int(period))
    return min(shares)
