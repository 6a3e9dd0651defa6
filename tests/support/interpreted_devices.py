"""The cuda, rocm and xpu platforms as they are, on facts of the card that each one's interpreted
suite has and tensors on the host: with Triton's kernels in their interpreter, or, where the user
names torch's kernels for every op, without Triton. What differs from a real one is the device
alone, and that no library of a vendor is installed. Chosen by name only."""

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


class HostTensors(HostedDevice):
    def attach(self) -> None:
        torch.set_num_threads(1)
        super().attach()

    def memory(self) -> tuple[int, int]:
        return FREE, FREE


def hosted(package: str, triton: bool) -> Any:
    """The platform of `sixfold.platforms.<package>`, under another name. Without `triton` its
    kernels are there and cannot run: nothing starts the interpreter."""
    home = import_module(f"sixfold.platforms.{package}")
    recorded = home.RECORDED

    class Hosted(type(home.PLATFORM)):  # type: ignore[misc]
        name = f"{'interpreted' if triton else 'hosted'}_{package}"

        def probe(self, machine: Machine) -> Probe:
            facts = home.device_facts(recorded, machine_with(recorded))
            how = "Triton's interpreter" if triton else "torch's kernels on host tensors"
            return Probe(True, RANK_BY_NAME, how, devices=(facts,))

        def executor(self, spec: EngineSpec, facts: DeviceFacts) -> Executor:
            if triton:
                start_interpreter()
            register = import_module(f"{home.__name__}.kernels").register
            device = HostTensors(facts)
            return TorchExecutor(spec, device, lambda registry: register(registry, device))

    return Hosted()


CUDA, ROCM, XPU = (hosted(package, triton=True) for package in ("cuda", "rocm", "xpu"))
XPU_WITHOUT_TRITON = hosted("xpu", triton=False)
