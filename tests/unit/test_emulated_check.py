"""Guards the op matrix of the two platforms whose devices are emulated or interpreted: every op has
a kernel that is run or refused with a reason, and `ci/emulated_check.py` is `sixfold check` itself,
called *emulated*, that fails for a kernel that is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.emulated_npu.platform import PLATFORM

from sixfold.common.ops import OPS
from sixfold.common.ops.registry import KernelRegistry
from sixfold.common.ops.suite import suite_of
from sixfold.platforms import xpu
from sixfold.platforms.interface_kernels import Suite
from sixfold.platforms.recorded_device import machine_with
from sixfold.platforms.torch_runtime.conformance import TorchRunner
from sixfold.platforms.torch_runtime.interpreted import HostedDevice
from sixfold.platforms.torch_runtime.kernels import register_generic

ROOT = Path(__file__).parents[2]
OF_METAL = {"paged_attention"}
"""Attention as one kernel of a lazy framework; the torch platforms have attention backends."""
COMMAND = [sys.executable, str(ROOT / "ci" / "emulated_check.py"), "--platform", "npu", "--json"]


def xpu_suite() -> Suite:
    from sixfold.platforms.triton_kernels.register import register_triton

    device = HostedDevice(xpu.device_facts(xpu.RECORDED, machine_with(xpu.RECORDED)))
    registry = KernelRegistry()
    register_generic(registry, device)
    register_triton(registry, device)
    return suite_of(registry, device.facts, TorchRunner(device), "interpreted")


def npu_suite() -> Suite:
    return PLATFORM.conformance(None)


@pytest.fixture
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulator that the suite installs is gone afterwards."""
    monkeypatch.setitem(sys.modules, "torch_npu", None)


@pytest.mark.usefixtures("_clean")
@pytest.mark.parametrize("suite", [npu_suite, xpu_suite])
def test_every_op_has_a_kernel(suite: Any) -> None:
    if suite is xpu_suite:
        pytest.importorskip("triton")
    assert {subject.op for subject in suite().subjects} == set(OPS) - OF_METAL


def test_the_command_is_the_real_one_and_called_emulated() -> None:
    done = subprocess.run([*COMMAND, "--op", "linear"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["platform"], found["evidence"]) == ("npu", "emulated")
    assert found["device"] == "Ascend 910B3"
    status = {(k["op"], k["provider"]): k["status"] for k in found["kernels"]}
    assert set(status.values()) == {"pass", "unsupported"}
    assert status["linear", "torch_npu"] == status["linear/int8_channel", "torch_npu"] == "pass"
    assert all(k["executed"] or k["refused"] for k in found["kernels"])


WRONG = """
import runpy, sys
sys.path[:0] = [{ci!r}, {tests!r}]
import matrix
from support.emulated_npu import pointwise
right = pointwise.npu_rms_norm.__code__
def wrong(input, gamma, epsilon=1e-06):
    return input * gamma, input
pointwise.npu_rms_norm.__code__ = wrong.__code__
sys.argv = ["check", "--platform", "npu", "--op", "rms_norm"]
runpy.run_path({script!r}, run_name="__main__")
"""


def test_a_wrong_kernel_of_the_emulator_fails_the_command() -> None:
    ci = ROOT / "ci"
    code = WRONG.format(ci=str(ci), tests=str(ROOT / "tests"), script=str(ci / "emulated_check.py"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "npu: Ascend 910B3 (emulated)" in done.stdout
    assert "FAILED: rms_norm torch_npu" in done.stdout
