"""What MLX has under test."""

from __future__ import annotations

from ...common.ops.registry import KernelRegistry
from ...common.ops.suite import suite_of
from ..interface import DeviceFacts
from ..interface_kernels import Suite
from .conformance import MLXRunner
from .kernels import register
from .memory import on_metal
from .primitives import register_primitives


def suite(facts: DeviceFacts) -> Suite:
    registry = KernelRegistry()
    register(registry)
    register_primitives(registry)
    evidence = "device" if on_metal() else "device: MLX's CPU backend"
    return suite_of(registry, facts, MLXRunner(), evidence)
