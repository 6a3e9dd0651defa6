"""The xpu platform as it is, with Triton's kernels in their interpreter: facts of the recorded
card, tensors on the host. What differs from a real one is the device alone. Chosen by name only."""

from __future__ import annotations

import torch

from sixfold.platforms.interface import DeviceFacts, EngineSpec, Executor, Machine, Probe
from sixfold.platforms.judgement import RANK_BY_NAME
from sixfold.platforms.recorded_device import machine_with
from sixfold.platforms.torch_runtime.executor import TorchExecutor
from sixfold.platforms.torch_runtime.interpreted import HostedDevice, start_interpreter
from sixfold.platforms.xpu import RECORDED, XPUPlatform, device_facts

FREE = 1 << 30


class InterpretedDevice(HostedDevice):
    def attach(self) -> None:
        torch.set_num_threads(1)
        super().attach()

    def memory(self) -> tuple[int, int]:
        return FREE, FREE


class InterpretedPlatform(XPUPlatform):
    name = "interpreted_xpu"

    def probe(self, machine: Machine) -> Probe:
        facts = device_facts(RECORDED, machine_with(RECORDED))
        return Probe(True, RANK_BY_NAME, "Triton's interpreter", devices=(facts,))

    def executor(self, spec: EngineSpec, facts: DeviceFacts) -> Executor:
        start_interpreter()
        from sixfold.platforms.triton_kernels.register import register_triton

        device = InterpretedDevice(facts)
        return TorchExecutor(spec, device, lambda registry: register_triton(registry, device))


PLATFORM = InterpretedPlatform()
