"""Processor and memory of a machine: what this process may use of them, not what the box has."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

import psutil

from .machine_source import Source

# Arm part numbers (MIDR_EL1 implementer 0x41, Arm Ltd technical reference manuals).
ARM_PARTS = {
    "0xd08": "Cortex-A72",
    "0xd0c": "Neoverse-N1",
    "0xd40": "Neoverse-V1",
    "0xd49": "Neoverse-N2",
    "0xd4f": "Neoverse-V2",
    "0xd84": "Neoverse-V3",
    "0xd8e": "Neoverse-N3",
}
# Apple's names of Arm features -> the names in Linux's /proc/cpuinfo.
DARWIN_FEATURES = {
    "AdvSIMD": "asimd",
    "FEAT_FP16": "asimdhp",
    "FEAT_DotProd": "asimddp",
    "FEAT_BF16": "bf16",
    "FEAT_I8MM": "i8mm",
    "FEAT_SME": "sme",
    "FEAT_SME2": "sme2",
}


@dataclass(frozen=True, slots=True)
class Processor:
    name: str
    features: frozenset[str]
    physical_cores: int  # usable by this process
    logical_cores: int


def processor(source: Source, system: str) -> Processor:
    if system == "darwin":
        return _darwin(source)
    fields = _cpuinfo(source)
    flags = fields.get("flags") or fields.get("Features") or ""
    name = fields.get("model name") or ARM_PARTS.get(fields.get("CPU part", ""), "")
    logical = _usable_cpus()
    quota = _cpu_quota(source)
    cores = {_core(source, cpu) for cpu in logical}
    return Processor(
        name or platform.processor() or platform.machine(),
        frozenset(flags.split()),
        max(1, min(len(cores), quota)),
        max(1, min(len(logical), quota)),
    )


def _cpuinfo(source: Source) -> dict[str, str]:
    """The first processor's fields."""
    block = source.text("/proc/cpuinfo").split("\n\n")[0]
    pairs = (line.split(":", 1) for line in block.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _usable_cpus() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _core(source: Source, cpu: int) -> tuple[str, str]:
    """What two hardware threads of one core share; the thread itself where that is not told."""
    folder = f"/sys/devices/system/cpu/cpu{cpu}/topology"
    package, core = (source.text(f"{folder}/{n}") for n in ("physical_package_id", "core_id"))
    return (package, core) if core else ("thread", str(cpu))


def _darwin(source: Source) -> Processor:
    keys = ("machdep.cpu.brand_string", "hw.physicalcpu", "hw.logicalcpu")
    name, physical, logical = (source.run(["sysctl", "-n", key]).strip() for key in keys)
    features = set(source.run(["sysctl", "-n", "machdep.cpu.features"]).lower().split())
    features |= set(source.run(["sysctl", "-n", "machdep.cpu.leaf7_features"]).lower().split())
    for line in source.run(["sysctl", "hw.optional"]).splitlines():
        key, _, value = line.partition(":")
        if value.strip() == "1" and key.rsplit(".", 1)[-1] in DARWIN_FEATURES:
            features.add(DARWIN_FEATURES[key.rsplit(".", 1)[-1]])
    counts = [int(n) if n.isdigit() else os.cpu_count() or 1 for n in (physical, logical)]
    return Processor(name or platform.processor(), frozenset(features), counts[0], counts[1])


def memory(source: Source) -> tuple[int, int]:
    """(total, available) bytes, the control group's limit respected."""
    seen = psutil.virtual_memory()
    total, available = int(seen.total), int(seen.available)
    for limit, used in _memory_limits(source):
        if 0 < limit < total:
            total = limit
        if limit > 0:
            available = min(available, max(0, limit - used))
    return total, available


def _cpu_quota(source: Source) -> int:
    """Cores' worth of time that the control groups allow, rounded up; a huge number when free."""
    shares = [math.inf]
    for folder in _groups(source, "cpu"):
        quota, _, period = source.text(f"{folder}/cpu.max").partition(" ")
        if not quota:
            quota = source.text(f"{folder}/cpu.cfs_quota_us")
            period = source.text(f"{folder}/cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period) > 0 and int(quota) > 0:
            shares.append(int(quota) / int(period))
    least = min(shares)
    return 1 << 20 if math.isinf(least) else max(1, math.ceil(least))


def _memory_limits(source: Source) -> Iterator[tuple[int, int]]:
    """(limit, used) of each control group that sets a limit. Reclaimable file cache is not used."""
    names = (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    )
    for folder in _groups(source, "memory"):
        for limit_name, used_name, cache_name in names:
            limit = source.text(f"{folder}/{limit_name}")
            if limit.isdigit():
                used = source.number(f"{folder}/{used_name}")
                lines = source.text(f"{folder}/memory.stat").splitlines()
                stat = dict(line.split(" ", 1) for line in lines if " " in line)
                yield int(limit), used - int(stat.get(cache_name, "0"))


def _groups(source: Source, controller: str) -> Iterator[str]:
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
