"""The cuda, rocm and xpu platforms as they are, with Triton's kernels in their interpreter: facts
of the card that each one's interpreted suite has, tensors on the host. What differs from a real one
is the device alone, and that no library of a vendor is installed. Chosen by name only."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from sixfold.platforms.interface import DeviceFacts, EngineSpec, Executor, Machine, Probe
from sixfold.platforms.judgement import RANK_BY_NAME
from sixfold.platforms.recorded_device import machine_with
from sixfold.platforms.torch_runtime.executor import TorchExecutor
from sixfold.platforms.torch_runtime.interpreted import HostedDevice, start_interpreter

FREE = 2 << 30


class InterpretedDevice(HostedDevice):
    def attach(self) -> None:
        torch.set_num_threads(1)
        super().attach()

    def memory(self) -> tuple[int, int]:
        return FREE, FREE


def interpreted(package: str) -> Any:
    """The platform of `sixfold.platforms.<package>`, under another name."""
    home = import_module(f"sixfold.platforms.{package}")
    recorded = home.RECORDED

    class Interpreted(type(home.PLATFORM)):  # type: ignore[misc]
        name = f"interpreted_{package}"

        def probe(self, machine: Machine) -> Probe:
            facts = home.device_facts(recorded, machine_with(recorded))
            return Probe(True, RANK_BY_NAME, "Triton's interpreter", devices=(facts,))

        def executor(self, spec: EngineSpec, facts: DeviceFacts) -> Executor:
            start_interpreter()
            register = import_module(f"{home.__name__}.kernels").register
            device = InterpretedDevice(facts)
            return TorchExecutor(spec, device, lambda registry: register(registry, device))

    return Interpreted()


CUDA, ROCM, XPU = (interpreted(package) for package in ("cuda", "rocm", "xpu"))
