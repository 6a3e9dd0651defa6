"""Guards the measured order of linear kernels: read from the file, taken from the nearest measured
level where a machine's own was not measured, and never from a file that names what is not there."""

from __future__ import annotations

import pytest
from support.kernel_checks import cpu_facts, cpu_registry

from sixfold.common.errors import KernelError
from sixfold.platforms.cpu.device import CpuDevice
from sixfold.platforms.cpu.linear_preference import PROVIDERS, preference, read, table
from sixfold.platforms.cpu.native_library import LEVELS

NEEDS = dict(LEVELS)
ROW = """
[[measured]]
level = "{level}"
cpu = "a CPU"
date = 2026-01-02
linear.float32 = {{ order = [{order}], ratio = "native 2 x onednn" }}
"""


def row(level: str, *order: str) -> str:
    return ROW.format(level=level, order=", ".join(f'"{name}"' for name in order))


TWO = read(
    row("avx2", "generic", "native", "onednn") + row("avx512vnni", "onednn", "native", "generic")
)


@pytest.mark.parametrize(
    ("level", "nearest"),
    [
        ("avx2", "avx2"),
        ("avxvnni", "avx2"),
        ("avx512", "avx512vnni"),
        ("amxint8", "avx512vnni"),
        ("neondot", "avx2"),
        ("portable", "avx2"),
    ],
)
def test_a_level_that_nobody_measured_takes_the_nearest(level: str, nearest: str) -> None:
    found = preference(NEEDS[level], TWO)
    assert (found.level, found.row.level) == (level, nearest)
    because = found.decision.because
    assert "measured on a CPU, 2026-01-02: native 2 x onednn" in because
    assert because.startswith("measured") == (level == nearest)
    if level != nearest:
        assert because.startswith(f"nobody has measured this on {level}; as on {nearest}, ")


def test_priorities_follow_the_order_around_the_generic_kernel() -> None:
    assert preference(NEEDS["avx2"], TWO).priorities == {"generic": 0, "native": -10, "onednn": -20}
    wide = preference(NEEDS["avx512vnni"], TWO).priorities
    assert wide == {"onednn": 20, "native": 10, "generic": 0}


@pytest.mark.parametrize("level", ["avx2", "avx512vnni"])
def test_the_registry_and_the_decisions_take_the_order_of_the_file(level: str) -> None:
    order = next(entry for entry in table() if entry.level == level).order["float32"]
    kernels = cpu_registry(features=NEEDS[level]).kernels()
    linear = {kernel.provider: kernel.priority for kernel in kernels if kernel.op == "linear"}
    assert sorted(linear, key=lambda name: -linear[name]) == [*order, "widened"]
    decisions = CpuDevice(cpu_facts(features=NEEDS[level])).decisions()
    (decision,) = (d for d in decisions if d.what == "order of linear kernels")
    assert decision.chosen == ", ".join(order)
    assert decision.because.startswith("measured on ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (row("avx2", "native", "mkl", "generic"), "'mkl'; there are: generic, native, onednn"),
        (row("avx3", *PROVIDERS), "level 'avx3'; there are: amxint8, "),
        (row("avx2", "native", "generic"), "must order generic, native, onednn"),
    ],
)
def test_a_file_that_names_what_is_not_there_fails(text: str, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        read(text)
