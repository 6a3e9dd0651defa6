"""Processor and memory of a machine: what this process may use of them, not what the box has."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass

import psutil

from .machine_control_groups import control_groups
from .machine_source import Source
from .machine_topology import topology, usable_cpus

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
    seen = topology(source, usable_cpus())
    quota = seen.whole_quota or len(seen.cpus)
    return Processor(
        name or platform.processor() or platform.machine(),
        frozenset(flags.split()),
        max(1, min(len(seen.first_of_each_core()), quota)),
        max(1, min(len(seen.cpus), quota)),
    )


def _cpuinfo(source: Source) -> dict[str, str]:
    """The first processor's fields."""
    block = source.text("/proc/cpuinfo").split("\n\n")[0]
    pairs = (line.split(":", 1) for line in block.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


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


def _memory_limits(source: Source) -> Iterator[tuple[int, int]]:
    """(limit, used) of each control group that sets a limit. Reclaimable file cache is not used."""
    names = (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    )
    for folder in control_groups(source, "memory"):
        for limit_name, used_name, cache_name in names:
            limit = source.text(f"{folder}/{limit_name}")
            if limit.isdigit():
                used = source.number(f"{folder}/{used_name}")
                lines = source.text(f"{folder}/memory.stat").splitlines()
                stat = dict(line.split(" ", 1) for line in lines if " " in line)
                yield int(limit), used - int(stat.get(cache_name, "0"))
