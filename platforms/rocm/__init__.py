"""AMD GPUs through torch's ROCm build."""

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
    RANK_BY_NAME,
    TORCH_SELECTOR,
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

RECORDED = Accelerator("amd", "AMD Instinct MI300X OAM", "gfx942", 206_158_430_208)
"""Whose facts the interpreted suite has."""

# What PyTorch's ROCm wheels hold code for (PYTORCH_ROCM_ARCH of its release builds).
WHEEL_ARCHITECTURES = frozenset(
    "gfx900 gfx906 gfx908 gfx90a gfx942 gfx950 gfx1030 gfx1100 gfx1101 gfx1102 gfx1150 gfx1151 "
    "gfx1200 gfx1201".split()
)
FP8 = {"gfx942": "fnuz", "gfx950": "ocp", "gfx1200": "ocp", "gfx1201": "ocp"}
LIBRARIES = ("torch", "triton", "amd-aiter")
VARIABLES = ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")


def architecture(word: str) -> tuple[int, ...]:
    """ "gfx942" -> (9, 4, 2), "gfx90a" -> (9, 0, 10), "gfx1100" -> (11, 0, 0)."""
    match = re.fullmatch(r"gfx(\d+)([0-9a-f])([0-9a-f])", word)
    return (int(match[1]), int(match[2], 16), int(match[3], 16)) if match else ()


def device_facts(device: Accelerator, machine: Machine) -> DeviceFacts:
    arch = architecture(device.arch)
    matrix = arch >= (9, 0, 8)  # CDNA's MFMA, RDNA 3's WMMA
    fp8 = FP8.get(device.arch, "none")
    return DeviceFacts(
        kind="rocm",
        name=device.name,
        arch=arch,
        memory_bytes=device.memory_bytes,
        unified_memory=False,
        lane_width=64 if arch[:1] == (9,) else 32,
        dtypes=frozenset({"float32", "float16"} | ({"bfloat16", "int8"} if matrix else set())),
        fp8="fnuz" if fp8 == "fnuz" else "ocp" if fp8 == "ocp" else "none",
        graphs="stream",
        libraries=libraries(machine, device, LIBRARIES),
    )


def driver_lacks(machine: Machine, devices: list[Accelerator]) -> list[Lack]:
    if all(not device.driver for device in devices):
        driver = "sudo amdgpu-install --usecase=rocm  # https://rocm.docs.amd.com; then reboot"
        return [Lack("the amdgpu kernel driver is not loaded", driver)]
    remedy = "sudo amdgpu-install --usecase=rocm  # then reboot"
    if "container" in machine.tools:
        remedy = "docker run --device /dev/kfd --device /dev/dri ...  # give the container its GPUs"
    groups = "render,video"
    lacks = node_lacks(machine, "/dev/kfd", Lack("/dev/kfd does not exist", remedy), groups)
    none = Lack("no /dev/dri/renderD* exists", remedy)
    return lacks + node_lacks(machine, "/dev/dri/renderD", none, groups)


def pip_index(machine: Machine) -> str:
    """Arguments that select the wheel of the ROCm that is installed."""
    version = numbers(machine.tools.get("rocm", ""))[:2]
    label = ".".join(map(str, version)) if version else "VERSION"
    index = f"--index-url https://download.pytorch.org/whl/rocm{label}"
    return f"{index}  # versions there are: {TORCH_SELECTOR}"


class ROCmPlatform:
    name = "rocm"

    def probe(self, machine: Machine) -> Probe:
        devices = of_vendor(machine, "amd")
        found = describe(devices)
        if not devices:
            lacks = absent(machine, "AMD GPU", VARIABLES)
            return judge(RANK_ACCELERATOR, "", found, lacks, ())
        if "rocm" in machine.tools:
            found.append(f"ROCm {machine.tools['rocm']}")
        lacks = driver_lacks(machine, devices)
        lacks += torch_lacks(machine, "hip", "rocm", pip_index(machine))
        facts = [device_facts(device, machine) for device in devices]
        reason = f"{devices[0].name} with torch for {machine.torch_build}; {UNVERIFIED}"
        rank, arch = RANK_ACCELERATOR, devices[0].arch
        if arch not in WHEEL_ARCHITECTURES and "HSA_OVERRIDE_GFX_VERSION" not in machine.tools:
            rank = RANK_BY_NAME
            reason += f"; PyTorch's wheels hold no code for {arch}: only by --platform rocm"
        return judge(rank, reason, found + torch_found(machine), lacks, facts)

    def supports(self, feature: str, facts: DeviceFacts) -> Support:
        return generic_support(feature)

    def device(self, facts: DeviceFacts, index: int) -> TorchDevice:
        from .device import ROCmDevice

        # torch's ROCm build calls its devices "cuda".
        return ROCmDevice(facts, f"cuda:{index}")

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


PLATFORM = ROCmPlatform()
