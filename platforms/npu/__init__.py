"""Huawei Ascend NPUs through torch_npu and CANN."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from ...common.errors import PlatformError
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
    node_lacks,
    numbers,
    of_vendor,
    torch_found,
    torch_lacks,
)
from ..recorded_device import no_interpreter, present

if TYPE_CHECKING:
    from ..torch_runtime.device import TorchDevice

CPU_INDEX = "--extra-index-url https://download.pytorch.org/whl/cpu"
SET_ENV = "source /usr/local/Ascend/ascend-toolkit/set_env.sh"
CANN_PAGE = "https://www.hiascend.com/cann"


OLDEST_CANN = (8, 5)
"""For torch_npu from 2.13 on, by the table of versions in its release notes (26.2.0)."""


def device_facts(device: Accelerator, machine: Machine) -> DeviceFacts:
    number = re.match(r"ascend(\d+)", device.arch)
    packages = ("torch", "torch_npu")
    libraries = {n: v for n, v in machine.packages.items() if n in packages}
    return DeviceFacts(
        kind="npu",
        name=device.name,
        arch=(int(number[1]),) if number else (),
        memory_bytes=device.memory_bytes,
        unified_memory=False,
        lane_width=64,  # 256-byte vector registers
        dtypes=frozenset({"float32", "float16", "int8"} | _bfloat16(device.arch)),
        fp8="none",
        graphs="tasks",
        libraries={**libraries, "cann": machine.tools.get("cann", ""), "driver": device.driver},
    )


def _bfloat16(arch: str) -> set[str]:
    """The first 910 and the 310 family have none."""
    return {"bfloat16"} if re.match(r"ascend910[bc]$", arch) else set()


def driver_lacks(machine: Machine, devices: list[Accelerator]) -> list[Lack]:
    if all(not device.driver for device in devices):
        driver = f"install the Ascend HDK driver and firmware: {CANN_PAGE}; then reboot"
        return [Lack("the Ascend driver is not installed", driver)]
    remedy = "sudo /usr/local/Ascend/driver/tools/upgrade-tool  # or reinstall the Ascend driver"
    if "container" in machine.tools:
        remedy = (
            "docker run --device /dev/davinci0 --device /dev/davinci_manager "
            "--device /dev/devmm_svm --device /dev/hisi_hdc ..."
        )
    missing = Lack("/dev/davinci0 does not exist", remedy)
    return node_lacks(machine, "/dev/davinci", missing, "HwHiAiUser")


def cann_lacks(machine: Machine) -> list[Lack]:
    if "cann" not in machine.tools:
        return [Lack("CANN is not installed", f"install the CANN toolkit and kernels: {CANN_PAGE}")]
    cann, adapter = machine.tools["cann"], machine.packages.get("torch_npu", "")
    if numbers(adapter)[:2] >= (2, 13) and numbers(cann)[:2] < OLDEST_CANN:
        text = f"CANN {cann} is older than torch_npu {adapter} takes (8.5 to 9.2)"
        return [Lack(text, f"install the toolkit and kernels of CANN 9.2.0: {CANN_PAGE}")]
    if "cann-environment" not in machine.tools:
        return [Lack("CANN's environment is not loaded in this shell", SET_ENV)]
    return []


def adapter_lacks(machine: Machine) -> list[Lack]:
    """torch_npu is built for exactly one torch: equal release numbers (its version table)."""
    torch, adapter = machine.packages.get("torch"), machine.packages.get("torch_npu")
    if torch is None:
        return []
    wanted = ".".join(map(str, numbers(torch)[:3]))
    if adapter is None:
        return [Lack("torch_npu is not installed", f"pip install 'torch_npu=={wanted}.*'")]
    if numbers(adapter)[:3] != numbers(torch)[:3]:
        text = f"torch_npu {adapter} does not fit torch {torch}"
        return [Lack(text, f"pip install 'torch_npu=={wanted}.*'")]
    return []


class NPUPlatform:
    name = "npu"

    def probe(self, machine: Machine) -> Probe:
        devices = of_vendor(machine, "huawei")
        found = describe(devices)
        if not devices:
            lacks = absent(machine, "Ascend NPU", ["ASCEND_RT_VISIBLE_DEVICES"])
            return judge(RANK_ACCELERATOR, "", found, lacks, ())
        if "cann" in machine.tools:
            found.append(f"CANN {machine.tools['cann']}")
        if "torch_npu" in machine.packages:
            found.append(f"torch_npu {machine.packages['torch_npu']}")
        lacks = driver_lacks(machine, devices) + cann_lacks(machine)
        lacks += torch_lacks(machine, "", "npu", CPU_INDEX) + adapter_lacks(machine)
        facts = [device_facts(device, machine) for device in devices]
        reason = f"{devices[0].name} with CANN and torch_npu; {UNVERIFIED}"
        return judge(RANK_ACCELERATOR, reason, found + torch_found(machine), lacks, facts)

    def supports(self, feature: str, facts: DeviceFacts) -> Support:
        return generic_support(feature)

    def device(self, facts: DeviceFacts, index: int) -> TorchDevice:
        """Imports torch_npu, which registers the device with torch. Raises PlatformError."""
        try:
            from .device import NPUDevice
        except (ImportError, OSError, RuntimeError) as error:  # a missing library, another torch
            raise PlatformError(f"torch_npu cannot be imported: {error}; {SET_ENV}.") from error

        return NPUDevice(facts, f"npu:{index}")

    def executor(self, spec: EngineSpec, facts: DeviceFacts) -> Executor:
        from ..torch_runtime.executor import TorchExecutor
        from .kernels import register

        device = self.device(facts, spec.device_index)
        return TorchExecutor(spec, device, lambda registry: register(registry, device))

    def conformance(self, facts: DeviceFacts | None, interpreted: bool = False) -> Suite:
        if interpreted:
            raise no_interpreter(self.name)
        from ..torch_runtime.conformance import device_suite
        from .kernels import register

        device = self.device(present(facts, self.name), 0)
        return device_suite(device, lambda registry: register(registry, device))

    def check_collectives(self, devices: Sequence[DeviceFacts]) -> CollectivesFound:
        from ..torch_runtime.collectives_check import check

        return check([partial(self.device, facts, i) for i, facts in enumerate(devices)])


PLATFORM = NPUPlatform()
