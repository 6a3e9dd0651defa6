"""The cpu platform's device and registry for tests, and its kernels under the suite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sixfold.common.ops.conformance import Verdict, check_op
from sixfold.common.ops.registry import KernelRegistry
from sixfold.common.ops.suite import kernel_subject
from sixfold.platforms.cpu.device import CpuDevice
from sixfold.platforms.cpu.kernels import register
from sixfold.platforms.cpu.packing import GROUP
from sixfold.platforms.interface import DeviceFacts
from sixfold.platforms.interface_kernels import Kernel, KernelTable, Op
from sixfold.platforms.torch_runtime.conformance import TorchRunner
from sixfold.platforms.torch_runtime.kernels import GENERIC, register_generic


def cpu_facts(**changes: Any) -> DeviceFacts:
    known = {
        "kind": "cpu",
        "name": "test CPU",
        "arch": (),
        "memory_bytes": 8 << 30,
        "unified_memory": True,
        "lane_width": 16,
        "dtypes": frozenset({"float32"}),
        "fp8": "none",
        "graphs": "none",
        "libraries": {},
        "features": frozenset({"avx2", "avx512f"}),
        "cores": 1,
    }
    return DeviceFacts(**{**known, **changes})


def cpu_device(**changes: Any) -> CpuDevice:
    return CpuDevice(cpu_facts(**changes), threads=1)


def cpu_registry(**changes: Any) -> KernelRegistry:
    registry = KernelRegistry()
    device = cpu_device(**changes)
    register_generic(registry, device)
    register(registry, device)
    return registry


def generic_table() -> KernelTable:
    """The kernels that every torch platform falls back to."""
    kernels = {op: Kernel(op, "generic", lambda f, p: None, fn) for op, fn in GENERIC.items()}
    return KernelTable(kernels, ())


def verdict_of(op: Op, fn: Callable[..., Any], *dtypes: str) -> Verdict:
    """What the suite says of a function given as a kernel of `op`, in float32 unless stated."""
    kernel = Kernel(op.name, "test", lambda facts, problem: None, fn)
    subject = kernel_subject(op, kernel, cpu_facts(), TorchRunner(cpu_device()))
    (verdict,) = check_op(op, [subject], dtypes=dtypes or ("float32",))
    return verdict


def rounded_to_bytes(x: torch.Tensor) -> torch.Tensor:
    """Activations as eight bits with a scale per 32, as the CPU's native `linear` rounds them."""
    rows, k = x.shape
    if not rows:
        return x
    groups = torch.nn.functional.pad(x, (0, -k % GROUP)).view(rows, -1, GROUP)
    most = groups.abs().amax(-1, keepdim=True)
    codes = (groups * torch.where(most > 0, 127 / most, 0.0)).round()
    return (codes * (most / 127)).view(rows, -1)[:, :k]
