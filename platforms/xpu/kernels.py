"""What an Intel GPU has beside the generic kernels: Triton's. None of them has run on one yet."""

from __future__ import annotations

from ...common.ops.registry import KernelRegistry
from ..torch_runtime.device import TorchDevice
from ..triton_kernels.register import register_triton


def register(registry: KernelRegistry, device: TorchDevice) -> None:
    register_triton(registry, device)
