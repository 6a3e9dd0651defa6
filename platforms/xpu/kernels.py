"""What an Intel GPU has beside the generic kernels: Triton's, oneDNN's products on stored integers,
and sampling whose sums are float32, for most of these GPUs have no float64. None of them has run on
one yet."""

from __future__ import annotations

from functools import partial

import torch

from ...common.ops.registry import KernelRegistry
from ..interface import DeviceFacts
from ..interface_kernels import Kernel, Problem
from ..torch_runtime.device import TorchDevice
from ..torch_runtime.sampler import sample
from ..torch_runtime.scaled_linear import scaled_linear
from ..triton_kernels.register import register_triton
from . import onednn

WITH_FLOAT64 = frozenset({(12, 60)})
"""Data Center Max."""
ABOVE_TRITON = 60
"""Whose sampling kernel leaves filtered rows to the generic one, with sums in float64."""


def _without_float64(facts: DeviceFacts, problem: Problem) -> str | None:
    return f"{facts.name} has float64" if facts.arch in WITH_FLOAT64 else None


def _scales_rows(facts: DeviceFacts, problem: Problem) -> str | None:
    """What torch's XPU product takes; which devices have the units, their facts say."""
    return None


def register(registry: KernelRegistry, device: TorchDevice) -> None:
    narrow = partial(sample, wide=torch.float32)
    registry.add(Kernel("sample", "float32_sums", _without_float64, narrow, ABOVE_TRITON))
    for kernel in onednn.kernels(device):
        registry.add(kernel)
    registry.add(scaled_linear(device.facts, _scales_rows))
    register_triton(registry, device)
