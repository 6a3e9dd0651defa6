"""What an NVIDIA GPU has beside the generic kernels: Triton's, FlashInfer's attention, and torch's
own products for eight-bit floats. None of them has run on one yet."""

from __future__ import annotations

from ...common.ops.registry import KernelRegistry
from ..interface import DeviceFacts
from ..interface_kernels import Problem
from ..torch_runtime.device import TorchDevice
from ..torch_runtime.scaled_linear import scaled_linear
from ..triton_kernels.register import register_triton
from .flashinfer_attention import FlashInferAttention

LIBRARY = 30
"""Priority of a vendor's library, above the portable kernels."""
ROW_SCALES = (9, 0)
"""Oldest architecture whose cuBLASLt or CUTLASS product takes a scale per row and column."""


def _scales_rows(facts: DeviceFacts, problem: Problem) -> str | None:
    if facts.arch < ROW_SCALES:
        has = ".".join(map(str, facts.arch)) or "unknown"
        return f"scales by row need compute capability 9.0, {facts.name} has {has}"
    return None


def register(registry: KernelRegistry, device: TorchDevice) -> None:
    register_triton(registry, device)
    registry.add(scaled_linear(device.facts, _scales_rows))
    registry.add_attention(FlashInferAttention(device), LIBRARY)
