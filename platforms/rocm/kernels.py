"""What an AMD GPU has beside the generic kernels: Triton's everywhere, aiter's where that library
is for its architecture, and torch's own products for eight-bit floats. None of them has run on one
yet."""

from __future__ import annotations

from ...common.ops.registry import KernelRegistry
from ..interface import DeviceFacts
from ..interface_kernels import Problem
from ..torch_runtime.device import TorchDevice
from ..torch_runtime.scaled_linear import scaled_linear
from ..triton_kernels.register import register_triton
from .aiter_attention import AiterAttention
from .aiter_norm import norms

LIBRARY = 30
"""Priority of a vendor's library, above the portable kernels."""
ROW_SCALES = {(9, 4, 2): "gfx942", (9, 5, 0): "gfx950"}
"""Architectures whose hipBLASLt product takes a scale per row and column."""


def _scales_rows(facts: DeviceFacts, problem: Problem) -> str | None:
    if facts.arch not in ROW_SCALES:
        return f"scales by row are for {' and '.join(ROW_SCALES.values())}, not {facts.name}"
    return None


def register(registry: KernelRegistry, device: TorchDevice) -> None:
    register_triton(registry, device)
    registry.add(scaled_linear(device.facts, _scales_rows))
    for kernel in norms(LIBRARY):
        registry.add(kernel)
    registry.add_attention(AiterAttention(device), LIBRARY)
