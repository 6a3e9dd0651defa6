"""What an Intel GPU has beside the generic kernels: Triton's, and oneDNN's products on stored
integers. None of them has run on one yet."""

from __future__ import annotations

from ...common.ops.registry import KernelRegistry
from ..interface import DeviceFacts
from ..interface_kernels import Problem
from ..torch_runtime.device import TorchDevice
from ..torch_runtime.scaled_linear import scaled_linear
from ..triton_kernels.register import register_triton
from . import onednn


def _scales_rows(facts: DeviceFacts, problem: Problem) -> str | None:
    """What torch's XPU product takes; which devices have the units, their facts say."""
    return None


def register(registry: KernelRegistry, device: TorchDevice) -> None:
    for kernel in onednn.kernels(device):
        registry.add(kernel)
    registry.add(scaled_linear(device.facts, _scales_rows))
    register_triton(registry, device)
