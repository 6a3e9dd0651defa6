"""The kernels that this platform registers."""

from __future__ import annotations

from ...common.ops.registry import KernelRegistry
from ..interface import DeviceFacts
from ..interface_kernels import Kernel, Problem
from .sampler import logprobs, sample


def _always(facts: DeviceFacts, problem: Problem) -> None:
    return None


def register(registry: KernelRegistry) -> None:
    registry.add(Kernel("sample", "generic", _always, sample))
    registry.add(Kernel("logprobs", "generic", _always, logprobs))
