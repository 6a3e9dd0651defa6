"""The kernels that this platform registers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...common.ops.registry import KernelRegistry
from ..interface import DeviceFacts
from ..interface_kernels import Kernel, Problem
from .metal.launch import Launcher, launch
from .metal.register import register_metal
from .page_kernels import page_digest, page_gather, paged_attention
from .sampler import logprobs, sample

GENERIC: dict[str, Callable[..., Any]] = {
    "page_gather": page_gather,
    "page_digest": page_digest,
    "paged_attention": paged_attention,
    "sample": sample,
    "logprobs": logprobs,
}


def _always(facts: DeviceFacts, problem: Problem) -> None:
    return None


def register(registry: KernelRegistry, launcher: Launcher = launch) -> None:
    """`launcher` starts the Metal kernels."""
    for op, fn in GENERIC.items():
        registry.add(Kernel(op, "generic", _always, fn))
    register_metal(registry, GENERIC, launcher)
