"""Registering the Metal kernels. On Metal each is compared with the generic kernel once in a
process, when an op that it could serve is resolved, and refused with the reason if it differs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

from ....common.ops.registry import KernelRegistry
from ...interface import Decision, DeviceFacts
from ...interface_kernels import Kernel, KernelTable, Problem
from ..loading import DTYPES
from .check import refusal
from .launch import Launcher, launch
from .page_digest import page_digest
from .page_gather import page_gather
from .paged_attention import paged_attention
from .sample import sample

PROVIDER = "metal"
KERNELS: dict[str, Callable[..., Any]] = {
    "page_gather": page_gather,
    "page_digest": page_digest,
    "paged_attention": paged_attention,
    "sample": sample,
}
NEEDS_METAL = "needs Metal; this is MLX's CPU backend"
EVIDENCE = "emulated in tests, never run on an Apple GPU by us"


def register_metal(
    registry: KernelRegistry, generic: dict[str, Callable[..., Any]], launcher: Launcher = launch
) -> None:
    """Add every Metal kernel above the one of `generic` that it is compared with."""
    for op, kernel in KERNELS.items():
        fn = partial(kernel, launcher)
        requires = _requires(op, fn, generic[op])
        registry.add(Kernel(op, PROVIDER, requires, fn, priority=10))


def _requires(
    op: str, fn: Callable[..., Any], trusted: Callable[..., Any]
) -> Callable[[DeviceFacts, Problem], str | None]:
    @cache
    def compared(dtype: str) -> str | None:
        return refusal(op, fn, trusted, DTYPES[dtype])

    def requires(facts: DeviceFacts, problem: Problem) -> str | None:
        return compared(problem.dtype) if "metal" in facts.features else NEEDS_METAL

    return requires


def decisions(*tables: KernelTable) -> list[Decision]:
    """What `--explain` says of them beyond the choice of each."""
    kernels = [kernel for table in tables for kernel in table.kernels.values()]
    used = sorted(kernel.op for kernel in kernels if kernel.provider == PROVIDER)
    because = f"{EVIDENCE}; compared with the generic kernels at this start"
    return [
        Decision("Metal kernels", ", ".join(used) or "none", because if used else EVIDENCE),
        Decision(
            "writes of new keys and values",
            "MLX's scatter, in place",
            "one launch for keys and one for values",
            (("Metal kernel", "mx.fast.metal_kernel gives outputs new buffers: a copied pool"),),
        ),
    ]
