"""Guards what MLX may use on a Mac: the GPU's recommended working set and not the RAM, weights and
cache wired where macOS can, a bound for freed buffers; and that `sixfold doctor` says what fits.
Metal's answers are a test's own: nothing here ran on a Mac."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import pytest
import recorded_machines
from rich.console import Console

from sixfold.platforms.mlx import memory, what_fits
from sixfold.server.doctor import diagnose, show

GIB = 1 << 30
Limits = dict[str, int]


@pytest.fixture
def metal(monkeypatch: pytest.MonkeyPatch) -> Limits:
    """A GPU whose working set is 10 GiB; the limits that MLX is told."""
    told: Limits = {}

    def teller(name: str) -> Callable[[int], None]:
        return lambda size: told.update({name: size})

    monkeypatch.setattr(memory, "on_metal", lambda: True)
    info = {"max_recommended_working_set_size": 10 * GIB, "memory_size": 16 * GIB}
    monkeypatch.setattr(mx, "device_info", lambda: info)
    monkeypatch.setattr(mx, "set_cache_limit", teller("cache"))
    monkeypatch.setattr(mx, "set_wired_limit", teller("wired"))
    return told


def limits(weights: int, cache: int, macos: str) -> dict[str, tuple[str, bool]]:
    found = memory.set_limits(weights, cache, macos)
    return {d.what: (d.chosen, d.fallback) for d in found}


def test_the_budget_is_the_working_set(metal: Limits) -> None:
    assert memory.working_set() == (10 * GIB, "the recommended working set of this GPU")


def test_weights_and_cache_are_wired_from_macos_15_on(metal: Limits) -> None:
    said = limits(4 * GIB, 3 * GIB, "15.6.1")
    assert metal == {"wired": 7 * GIB, "cache": 3 * GIB // 2}
    assert said["wired memory"] == ("7.00 GiB", False)
    assert said["buffer cache"] == ("1.50 GiB", False)


def test_no_more_is_wired_than_the_working_set(metal: Limits) -> None:
    limits(8 * GIB, 5 * GIB, "26.0")
    assert metal == {"wired": 10 * GIB, "cache": 256 << 20}


@pytest.mark.parametrize("macos", ["14.7", "", "14"])
def test_an_older_macos_wires_nothing_and_it_is_said(metal: Limits, macos: str) -> None:
    assert limits(4 * GIB, 3 * GIB, macos)["wired memory"] == ("none", True)
    assert "wired" not in metal


def test_on_a_cpu_nothing_is_wired(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(size: int) -> None:
        raise AssertionError("wired on a CPU")

    monkeypatch.setattr(mx, "set_wired_limit", never)
    before = mx.set_cache_limit(1 << 40)
    try:
        assert limits(1, 1, "15.6")["wired memory"] == ("none", False)
    finally:
        mx.set_cache_limit(before)


def test_doctor_names_chip_memory_system_and_what_fits() -> None:
    machine = recorded_machines.load("apple_m4")[0]
    out = io.StringIO()
    show(diagnose(machine), Console(file=out, width=200, highlight=False, markup=False))
    text = " ".join(out.getvalue().split())
    assert "Apple M4" in text
    assert "16 GiB" in text or "16.0 GiB" in text
    assert "15.6" in text
    assert what_fits(machine.memory_bytes) in text
    assert "mlx 0.32.4" in text
    old = diagnose(replace(machine, os_version="13.6")).found["mlx"]
    assert not old.usable
    assert "macOS 13.6 is older than 14.0" in " ".join(old.missing)


@pytest.mark.parametrize(
    ("memory_gib", "words"),
    [(8, "5.3 GiB"), (16, "16 billion parameters in 4 bits, 5 in 16"), (48, "36.0 GiB")],
)
def test_what_fits_is_the_table_of_the_guide(memory_gib: int, words: str) -> None:
    assert words in what_fits(memory_gib * GIB)
