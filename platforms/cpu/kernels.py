"""Kernels that a CPU has beside the generic ones; which is preferred was measured."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ...common.ops.registry import KernelRegistry
from ..interface import DeviceFacts
from ..interface_kernels import Kernel, Problem
from ..torch_runtime.sampler import sample

SHORTLIST = 512
"""Best tokens tried before a whole vocabulary is sorted; a top-p of 0.95 rarely needs more."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """oneDNN's matrix product on weights as they are, not repacked: nothing is stored twice."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _needs_onednn(facts: DeviceFacts, problem: Problem) -> str | None:
    if not torch.backends.mkldnn.is_available():
        return "this torch build has no oneDNN"
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this torch build has no mkldnn::_linear_pointwise"
    if problem.dtype != "float32":
        return f"serves float32, not {problem.dtype}"
    return None


def _always(facts: DeviceFacts, problem: Problem) -> None:
    return None


def onednn_priority(facts: DeviceFacts) -> int:
    """Preference, as opposed to ability. With AVX-512 (measured on Zen 5, float32, 1 to 512
    rows) this product took a quarter to a half of the generic one's time; elsewhere nobody has
    measured it."""
    return 10 if "avx512f" in facts.features else -10


def register(registry: KernelRegistry, facts: DeviceFacts) -> None:
    priority = onednn_priority(facts)
    registry.add(Kernel("linear", "onednn", _needs_onednn, linear, priority))
    # Reading a value costs nothing where the host is the device.
    host_sample = partial(sample, shortlist=SHORTLIST)
    registry.add(Kernel("sample", "shortlist", _always, host_sample, priority=10))
