"""Guards the interpreted suite: Triton kernels run on host tensors with the facts of a recorded
device, a fault in one is caught, and nothing else counts as run."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import recorded_machines

from sixfold.common.errors import PlatformError
from sixfold.platforms import cuda, rocm, xpu
from sixfold.platforms.recorded_device import machine_with
from sixfold.platforms.torch_runtime import interpreted

PROGRAM = Path(__file__).parents[1] / "support/interpreted_silu.py"
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


@needs_triton
def test_a_kernel_is_interpreted_and_a_fault_in_it_is_caught() -> None:
    done = subprocess.run([sys.executable, PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    right, wrong = json.loads(done.stdout)
    assert (right["device"], right["evidence"]) == ("NVIDIA H100 80GB HBM3", "interpreted")
    assert right["triton"]["status"] == "pass"
    assert wrong["triton"]["status"] == "fail"
    assert right["dtypes"]["triton"] == ["float32", "float16"]
    assert "bfloat16" in next(iter(right["triton"]["unverified"]))
    assert right["generic"]["status"] == "unverified"


@pytest.mark.parametrize(
    ("platform", "recorded"),
    [(cuda, "nvidia_h100"), (rocm, "amd_mi300x"), (xpu, "intel_arc_b580")],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_the_recorded_device_is_the_one_of_the_facts(platform, recorded: str) -> None:
    machine, _ = recorded_machines.load(recorded)
    known = platform.device_facts(machine.accelerators[0], machine)
    facts = platform.device_facts(platform.RECORDED, machine_with(platform.RECORDED))
    for field in ("kind", "name", "arch", "memory_bytes", "lane_width", "dtypes", "fp8"):
        assert getattr(facts, field) == getattr(known, field)


def test_an_interpreter_that_comes_too_late_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreted, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "triton", object())
    monkeypatch.delenv(interpreted.VARIABLE, raising=False)
    with pytest.raises(PlatformError, match="imported already"):
        interpreted.start_interpreter()


def test_without_triton_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreted, "find_spec", lambda name: None)
    with pytest.raises(PlatformError, match="pip install triton"):
        interpreted.start_interpreter()


@pytest.mark.parametrize("name", ["cpu", "mlx", "npu"])
def test_platforms_without_an_interpreter_say_so(name: str) -> None:
    from sixfold.platforms.select import platforms

    with pytest.raises(PlatformError, match="leave --interpret out"):
        platforms()[name].conformance(None, interpreted=True)
