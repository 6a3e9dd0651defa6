"""Ops and kernels. An op is its numpy reference, its cases and its tolerance; a kernel is one
provider's way to compute it, with a predicate that says why not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .interface import Decision, DeviceFacts


@dataclass(frozen=True, slots=True)
class Tolerance:
    atol: float
    rtol: float


@dataclass(frozen=True, slots=True)
class Case:
    """One conformance case: keyword arguments (numpy arrays and plain scalars) and a name."""

    name: str
    args: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Op:
    """A contract. `reference(**case.args)` gives a numpy array or a tuple of them."""

    name: str
    reference: Callable[..., Any]
    cases: Callable[[np.random.Generator], Iterable[Case]]
    tolerance: Mapping[str, Tolerance]  # by dtype
    parts: tuple[str, ...] = ()  # what a fused op stands for


@dataclass(frozen=True, slots=True)
class Problem:
    """Static facts of a call site: dtype and whatever sizes matter (`dims`)."""

    op: str
    dtype: str
    dims: Mapping[str, int] = field(default_factory=dict)
    weights: str = ""  # the scheme (docs/weights.md) when weights are not kept as `dtype`


@dataclass(frozen=True, slots=True)
class Kernel:
    """`requires(facts, problem)` answers None (can run) or the reason why not."""

    op: str
    provider: str  # "generic", "triton", "native", ...
    requires: Callable[[DeviceFacts, Problem], str | None]
    fn: Callable[..., Any]
    priority: int = 0  # order among those that qualify; generic kernels are 0
    graph_safe: bool = True
    # Brings a matrix once, at load, into the form that `fn` takes in its place. Kernels of one
    # provider share that form; None: `fn` takes the checkpoint's own.
    prepare: Callable[[Any, Problem], Any] | None = None
    # For a form worth keeping on disk: prepared -> (JSON facts, tensors by name), and back.
    dismantle: Callable[[Any], tuple[dict[str, Any], dict[str, Any]]] | None = None
    restore: Callable[[Mapping[str, Any], Mapping[str, Any]], Any] | None = None


@dataclass(frozen=True)
class KernelTable:
    """One callable per op, resolved once at start: `table.rms_norm(x, w, eps)`."""

    kernels: Mapping[str, Kernel]
    decisions: tuple[Decision, ...]

    def __getattr__(self, op: str) -> Callable[..., Any]:
        try:
            kernel = self.kernels[op]
        except KeyError:
            raise AttributeError(
                f"no kernel bound for op {op!r}; bound: {sorted(self.kernels)}"
            ) from None
        # Bind on the instance so that the next access is a plain attribute.
        object.__setattr__(self, op, kernel.fn)
        return kernel.fn
