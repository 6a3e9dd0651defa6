"""Intel GPUs through torch's XPU build, with Triton's kernels; never run on one yet."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from ..interface import (
    Accelerator,
    DeviceFacts,
    EngineSpec,
    Executor,
    Machine,
    Probe,
    Support,
)
from ..interface_collectives import CollectivesFound
from ..interface_kernels import Suite
from ..judgement import (
    RANK_ACCELERATOR,
    RANK_BY_NAME,
    UNVERIFIED,
    Lack,
    absent,
    describe,
    generic_support,
    judge,
    node_lacks,
    numbers,
    of_vendor,
    torch_found,
    torch_lacks,
)
from ..recorded_device import machine_with, present

if TYPE_CHECKING:
    from ..torch_runtime.device import TorchDevice

RECORDED = Accelerator("intel", "Arc B580", "bmg", 12_884_901_888)
"""Whose facts the interpreted suite has."""

# Graphics IP versions (kernel's xe driver, platform descriptors).
ARCHITECTURES = {
    "dg2": (12, 55), "pvc": (12, 60), "mtl": (12, 70), "bmg": (20, 1), "lnl": (20, 4),
    "ptl": (30, 0),
}  # fmt: skip
WITH_FLOAT64 = frozenset({"pvc"})
DISCRETE = frozenset({"dg2", "pvc", "bmg"})
EXTENSION = "intel-extension-for-pytorch"
INDEX = "--index-url https://download.pytorch.org/whl/xpu"
SUPPORTED = "none in software: this platform needs an Intel Arc, Data Center Max or Core Ultra GPU"
RUNTIME = (
    "sudo apt install libze1 libze-intel-gpu1 intel-opencl-icd"
    "  # elsewhere: https://dgpu-docs.intel.com"
)


def device_facts(device: Accelerator, machine: Machine) -> DeviceFacts:
    integrated = device.arch not in DISCRETE
    return DeviceFacts(
        kind="xpu",
        name=device.name,
        arch=ARCHITECTURES.get(device.arch, ()),
        memory_bytes=device.memory_bytes or (machine.memory_bytes if integrated else 0),
        unified_memory=integrated,
        float64=device.arch in WITH_FLOAT64,
        lane_width=8 if device.arch == "dg2" else 16,  # native SIMD of the vector engine
        dtypes=frozenset({"float32", "float16", "bfloat16", "int8"}),
        fp8="none",
        graphs="stream" if _has_graphs(machine) else "none",
        libraries={"torch": machine.packages.get("torch", ""), "driver": device.driver},
    )


def _has_graphs(machine: Machine) -> bool:
    """`torch.xpu.XPUGraph`, which was seen in torch 2.13."""
    return numbers(machine.packages.get("torch", "0"))[:2] >= (2, 13)


def driver_lacks(machine: Machine, devices: list[Accelerator]) -> list[Lack]:
    if machine.os == "windows":
        return []
    if all(not device.driver for device in devices):
        kernel = "sudo apt install linux-generic-hwe-24.04  # a kernel with xe or i915; then reboot"
        return [Lack("no kernel driver (xe or i915) is bound to the GPU", kernel)]
    missing = Lack("no /dev/dri/renderD* exists", "docker run --device /dev/dri ...")
    lacks = node_lacks(machine, "/dev/dri/renderD", missing, "render,video")
    if "level-zero-gpu" not in machine.tools:
        lacks.append(Lack("Intel's Level Zero GPU runtime is not installed", RUNTIME))
    return lacks


def extension_lacks(machine: Machine) -> list[Lack]:
    """Intel's extension ended with 2.8; imported beside a newer torch it ends the process."""
    version = machine.packages.get(EXTENSION)
    torch = machine.packages.get("torch", "")
    if version is None or numbers(version)[:2] == numbers(torch)[:2]:
        return []
    text = f"{EXTENSION} {version} does not fit torch {torch}, which needs no extension"
    return [Lack(text, f"pip uninstall -y {EXTENSION}")]


class XPUPlatform:
    name = "xpu"

    def probe(self, machine: Machine) -> Probe:
        seen = of_vendor(machine, "intel")
        devices = [device for device in seen if device.arch]
        found = describe(seen)
        if not devices:
            lacks = absent(machine, "Intel GPU", ["ZE_AFFINITY_MASK"])
            if seen:
                lacks = [Lack(f"torch does not support {seen[0].name}", SUPPORTED)]
            return judge(RANK_ACCELERATOR, "", found, lacks, ())
        lacks = driver_lacks(machine, devices) + torch_lacks(machine, "xpu", "xpu", INDEX)
        lacks += extension_lacks(machine)
        facts = [device_facts(device, machine) for device in devices]
        reason = f"{devices[0].name} with torch for {machine.torch_build}; {UNVERIFIED}"
        rank = RANK_ACCELERATOR
        if devices[0].arch not in DISCRETE:
            rank = RANK_BY_NAME
            reason += "; it shares the CPU's memory bandwidth: only by --platform xpu"
        return judge(rank, reason, found + torch_found(machine), lacks, facts)

    def supports(self, feature: str, facts: DeviceFacts) -> Support:
        return generic_support(feature)

    def device(self, facts: DeviceFacts, index: int) -> TorchDevice:
        from .device import XPUDevice

        return XPUDevice(facts, f"xpu:{index}")

    def executor(self, spec: EngineSpec, facts: DeviceFacts) -> Executor:
        from ..torch_runtime.executor import TorchExecutor
        from .kernels import register

        device = self.device(facts, spec.device_index)
        return TorchExecutor(spec, device, lambda registry: register(registry, device))

    def conformance(self, facts: DeviceFacts | None, interpreted: bool = False) -> Suite:
        from .kernels import register

        if interpreted:
            from ..torch_runtime.interpreted import interpreted_suite

            recorded = facts or device_facts(RECORDED, machine_with(RECORDED))
            return interpreted_suite(recorded, register)
        from ..torch_runtime.conformance import device_suite

        device = self.device(present(facts, self.name), 0)
        return device_suite(device, lambda registry: register(registry, device))

    def check_collectives(self, devices: Sequence[DeviceFacts]) -> CollectivesFound:
        from ..torch_runtime.collectives_check import check

        return check([partial(self.device, facts, i) for i, facts in enumerate(devices)])


PLATFORM = XPUPlatform()
