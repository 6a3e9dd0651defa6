"""NVIDIA GPUs through torch's CUDA build."""

from __future__ import annotations

import re
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
    UNVERIFIED,
    Lack,
    absent,
    describe,
    generic_support,
    judge,
    libraries,
    node_lacks,
    numbers,
    of_vendor,
    torch_found,
    torch_lacks,
)
from ..recorded_device import machine_with, present

if TYPE_CHECKING:
    from ..torch_runtime.device import TorchDevice

RECORDED = Accelerator("nvidia", "NVIDIA H100 80GB HBM3", "sm_90", 85_520_809_984)
"""Whose facts the interpreted suite has."""

# Oldest Linux driver for a CUDA major version (CUDA compatibility guide, minor-version table).
DRIVERS = {11: (450, 80), 12: (525, 60), 13: (580, 65)}
# Oldest CUDA whose compiler knows an architecture (CUDA release notes).
COMPILERS: dict[tuple[int, ...], tuple[int, ...]] = {
    (9, 0): (11, 8),
    (10, 0): (12, 8),
    (10, 3): (12, 9),
    (12, 0): (12, 8),
    (12, 1): (12, 9),
}
LIBRARIES = ("torch", "triton", "flashinfer-python")
OLDEST_ARCH = {12: (5, 0), 13: (7, 5)}
DRIVER_REMEDY = (
    "sudo ubuntu-drivers install  # elsewhere: https://www.nvidia.com/drivers; then reboot"
)
CONTAINER_REMEDY = "docker run --gpus all ...  # start the container with its GPUs"


def architecture(word: str) -> tuple[int, ...]:
    """ "sm_90" -> (9, 0); () when the driver did not say."""
    match = re.fullmatch(r"sm_(\d+)(\d)", word)
    return (int(match[1]), int(match[2])) if match else ()


def device_facts(device: Accelerator, machine: Machine) -> DeviceFacts:
    arch = architecture(device.arch)
    dtypes = {"float32", "float16"}
    dtypes |= {"bfloat16"} if arch >= (8, 0) else set()
    dtypes |= {"int8"} if arch >= (7, 5) else set()
    return DeviceFacts(
        kind="cuda",
        name=device.name,
        arch=arch,
        memory_bytes=device.memory_bytes,
        unified_memory=False,
        lane_width=32,
        dtypes=frozenset(dtypes),
        fp8="ocp" if arch >= (8, 9) else "none",
        graphs="stream",
        libraries=libraries(machine, device, LIBRARIES),
    )


def driver_lacks(machine: Machine, devices: list[Accelerator]) -> list[Lack]:
    contained = "container" in machine.tools
    if all(not device.driver for device in devices):
        return [Lack("the NVIDIA driver is not loaded", DRIVER_REMEDY)]
    remedy = CONTAINER_REMEDY if contained else "sudo nvidia-modprobe -u -c=0"
    if "/dev/dxg" in machine.device_nodes or machine.os == "windows":
        return []  # Windows, also below WSL, has no such nodes
    return node_lacks(machine, "/dev/nvidia", Lack("/dev/nvidia0 does not exist", remedy), "video")


def build_lacks(machine: Machine, devices: list[Accelerator]) -> list[Lack]:
    """Does this torch's CUDA fit the driver and the GPUs?"""
    built = numbers(machine.torch_build.removeprefix("cuda "))
    if not built:
        return []
    lacks, label = [], ".".join(map(str, built))
    needed = DRIVERS.get(built[0], (0,))
    driver = min((numbers(d.driver) for d in devices if d.driver), default=())
    if driver and driver < needed:
        text = f"driver {devices[0].driver} is too old for torch's CUDA {label}"
        lacks.append(Lack(f"{text} (needs {needed[0]} or newer)", DRIVER_REMEDY))
    newer = "pip install --upgrade torch"
    for device in devices:
        arch = architecture(device.arch)
        if arch and built[:2] < COMPILERS.get(arch, (0,)):
            lacks.append(Lack(f"torch's CUDA {label} has no code for {device.arch}", newer))
        if arch and arch < OLDEST_ARCH.get(built[0], (0,)):
            older = "pip install torch from the index of an older CUDA: https://pytorch.org"
            lacks.append(Lack(f"torch's CUDA {label} dropped {device.arch}", older))
    return lacks


class CUDAPlatform:
    name = "cuda"

    def probe(self, machine: Machine) -> Probe:
        devices = of_vendor(machine, "nvidia")
        found = describe(devices)
        if not devices:
            lacks = absent(machine, "NVIDIA GPU", ["CUDA_VISIBLE_DEVICES"])
            return judge(RANK_ACCELERATOR, "", found, lacks, ())
        index = "--index-url https://download.pytorch.org/whl/cu128"
        lacks = driver_lacks(machine, devices)
        wrong = torch_lacks(machine, "cuda", "cuda", index if machine.os == "windows" else "")
        lacks += wrong or build_lacks(machine, devices)
        facts = [device_facts(device, machine) for device in devices]
        reason = f"{devices[0].name} with torch for {machine.torch_build}; {UNVERIFIED}"
        return judge(RANK_ACCELERATOR, reason, found + torch_found(machine), lacks, facts)

    def supports(self, feature: str, facts: DeviceFacts) -> Support:
        return generic_support(feature)

    def device(self, facts: DeviceFacts, index: int) -> TorchDevice:
        from .device import CUDADevice

        return CUDADevice(facts, f"cuda:{index}")

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


PLATFORM = CUDAPlatform()
