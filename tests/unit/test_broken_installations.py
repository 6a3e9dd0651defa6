"""Guards what `sixfold doctor` says of broken npu and xpu installations: one sentence for each,
with the step that mends it, before anything is imported that would crash. Each fault is injected
into a recorded machine that is usable without it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from recorded_machines import load

from sixfold.common.errors import PlatformError
from sixfold.platforms import select
from sixfold.platforms.interface import Machine, Probe, Status
from sixfold.platforms.torch_runtime.device import TorchDevice
from sixfold.platforms.xpu.device import XPUDevice


def without_driver(machine: Machine) -> dict[str, Any]:
    return {"accelerators": tuple(replace(a, driver="") for a in machine.accelerators)}


def without(field: str, *names: str) -> Any:
    def change(machine: Machine) -> dict[str, Any]:
        kept: Mapping[str, str] = getattr(machine, field)
        return {field: {k: v for k, v in kept.items() if k not in names}}

    return change


def package(name: str, version: str) -> Any:
    return lambda machine: {"packages": {**machine.packages, name: version}}


def old_cann(machine: Machine) -> dict[str, Any]:
    return {"tools": {**machine.tools, "cann": "8.3.RC1"}}


def denied(machine: Machine) -> dict[str, Any]:
    return {"denied_nodes": machine.device_nodes}


def without_nodes(machine: Machine) -> dict[str, Any]:
    return {"device_nodes": ()}


NPU, XPU = ("npu", "ascend_910c"), ("xpu", "intel_arc_b70")
BROKEN = [
    (NPU, without_driver, "the Ascend driver is not installed", "install the Ascend HDK driver"),
    (NPU, without("tools", "cann", "cann-environment"), "CANN is not installed", "CANN toolkit"),
    (NPU, without("tools", "cann-environment"), "environment is not loaded", "set_env.sh"),
    (NPU, old_cann, "8.3.RC1 is older than torch_npu 2.13.0 takes", "of CANN 9.2.0"),
    (NPU, without("packages", "torch_npu"), "torch_npu is not installed", "torch_npu==2.13.0.*"),
    (
        NPU,
        package("torch_npu", "2.12.0"),
        "2.12.0 does not fit torch 2.13.0",
        "torch_npu==2.13.0.*",
    ),
    (NPU, package("torch", "2.14.1"), "2.13.0 does not fit torch 2.14.1", "torch_npu==2.14.1.*"),
    (NPU, denied, "may not open /dev/davinci0", "usermod -aG HwHiAiUser"),
    (NPU, without_nodes, "/dev/davinci0 does not exist", "upgrade-tool"),
    (XPU, without_driver, "no kernel driver (xe or i915)", "apt install linux-generic-hwe"),
    (XPU, denied, "may not open /dev/dri/renderD128", "usermod -aG render,video"),
    (XPU, without("tools", "level-zero-gpu"), "Level Zero GPU runtime", "apt install libze1"),
    (XPU, without("packages", "torch"), "torch is not installed", "sixfold[xpu]"),
    (XPU, lambda m: {"torch_build": "cpu"}, "is built for cpu", "download.pytorch.org/whl/xpu"),
    (
        XPU,
        package("intel-extension-for-pytorch", "2.8.10"),
        "intel-extension-for-pytorch 2.8.10 does not fit torch 2.13.0+xpu",
        "pip uninstall -y intel-extension-for-pytorch",
    ),
]


def probe(name: str, machine: Machine) -> Probe:
    return select.platforms()[name].probe(machine)


@pytest.mark.parametrize(("where", "change", "sentence", "step"), BROKEN)
def test_a_broken_installation_is_told_with_its_step(
    where: tuple[str, str], change: Any, sentence: str, step: str
) -> None:
    name, recorded = where
    machine = load(recorded)[0]
    assert probe(name, machine).usable
    found = probe(name, replace(machine, **change(machine)))
    assert not found.usable
    assert len(found.missing) == 1
    assert sentence in found.reason
    assert "\n" not in found.reason
    assert step in found.remedy
    assert len(found.remedy.splitlines()) == 1


def test_versions_of_the_stack_are_named() -> None:
    (facts, *_) = probe("npu", load("ascend_910c")[0]).devices
    assert set(facts.libraries) == {"torch", "torch_npu", "cann", "driver"}
    found = " ".join(probe("npu", load("ascend_910c")[0]).found)
    for part in ("driver 25.2.0", "CANN 8.5.0", "torch_npu 2.13.0", "torch 2.13.0"):
        assert part in found


def test_an_import_that_fails_is_told_with_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
            if name == "torch_npu":
                raise ImportError("libhccl.so: cannot open shared object file")

    monkeypatch.delitem(sys.modules, "torch_npu", raising=False)
    monkeypatch.delitem(sys.modules, "sixfold.platforms.npu.device", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    platform: Any = select.platforms()["npu"]
    (facts,) = platform.probe(load("ascend_910c")[0]).devices
    with pytest.raises(PlatformError, match=r"imported: libhccl\.so.*; source .*set_env\.sh"):
        platform.device(facts, 0)


def no_query(self: Any) -> tuple[int, int]:
    raise RuntimeError("The device does not support querying free memory")


def xpu(recorded: str) -> XPUDevice:
    (facts,) = probe("xpu", load(recorded)[0]).devices
    device = XPUDevice(facts, "cpu")
    assert device.torch_device == torch.device("cpu")
    return device


def test_an_integrated_gpu_without_a_memory_query_uses_the_hosts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(TorchDevice, "memory", no_query)
    device = xpu("intel_core_ultra")
    answer = device.memory_query()
    assert (answer.status, "does not tell free memory" in answer.reason) == (Status.NO, True)
    free, total = device.memory()
    assert 0 < free <= total
    (decision,) = [d for d in device.decisions() if d.what == "memory"]
    assert (decision.chosen, decision.fallback) == ("the host's", True)


def test_a_card_without_a_memory_query_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TorchDevice, "memory", no_query)
    with pytest.raises(PlatformError, match=r"Arc Pro B70: its driver does not tell free memory"):
        xpu("intel_arc_b70").memory()


def test_a_device_that_answers_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TorchDevice, "memory", lambda self: (3, 4))
    assert xpu("intel_arc_b70").memory() == (3, 4)
    assert xpu("intel_arc_b70").decisions() == ()


def test_an_xpu_without_float64_is_asked_for_none() -> None:
    """Arc and integrated GPUs have no 64-bit floats; no platform lists them as a dtype to run."""
    for recorded in ("intel_arc_b70", "intel_arc_b580", "intel_core_ultra", "intel_max_1550"):
        (facts,) = probe("xpu", load(recorded)[0]).devices
        assert "float64" not in facts.dtypes
