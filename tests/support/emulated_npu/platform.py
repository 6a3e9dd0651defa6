"""The npu platform as it is, over the emulator: facts of a recorded 910B, tensors on the host.

What differs from a real one is the device alone, and with it where `torch_npu` comes from. It is
chosen by name only.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from sixfold.common.ops.registry import KernelRegistry
from sixfold.common.ops.suite import suite_of
from sixfold.platforms.interface import Accelerator, DeviceFacts, Machine, Probe
from sixfold.platforms.interface_kernels import Suite
from sixfold.platforms.judgement import RANK_BY_NAME
from sixfold.platforms.npu import NPUPlatform, device_facts
from sixfold.platforms.npu.graphs import TaskGraphs
from sixfold.platforms.recorded_device import machine_with
from sixfold.platforms.torch_runtime.conformance import TorchRunner
from sixfold.platforms.torch_runtime.interpreted import HostedDevice
from sixfold.platforms.torch_runtime.kernels import register_generic

from . import module

RECORDED = Accelerator("huawei", "Ascend 910B3", "ascend910b", 68_719_476_736)
VERSIONS = {"torch": "2.13.0", "torch_npu": "2.13.0"}
FREE = 1 << 30


def facts() -> DeviceFacts:
    return device_facts(RECORDED, replace(machine_with(RECORDED), packages=VERSIONS))


class EmulatedDevice(HostedDevice):
    """Host tensors under an NPU's facts."""

    def attach(self) -> None:
        """One thread: tiny tensors gain nothing from more, which wait for each other."""
        torch.set_num_threads(1)
        super().attach()

    def memory(self) -> tuple[int, int]:
        return FREE, FREE

    @property
    def graphs(self) -> TaskGraphs:
        return TaskGraphs(self)


class EmulatedPlatform(NPUPlatform):
    name = "emulated_npu"

    def probe(self, machine: Machine) -> Probe:
        return Probe(True, RANK_BY_NAME, "the emulator of torch_npu", devices=(facts(),))

    def device(self, facts: DeviceFacts, index: int) -> EmulatedDevice:
        sys.modules["torch_npu"] = module()
        return EmulatedDevice(facts)

    def conformance(self, known: DeviceFacts | None, interpreted: bool = False) -> Suite:
        from sixfold.platforms.npu.kernels import register

        device = self.device(known or facts(), 0)
        registry = KernelRegistry()
        register_generic(registry, device)
        register(registry, device)
        return suite_of(registry, device.facts, TorchRunner(device), "emulated")


PLATFORM = EmulatedPlatform()
