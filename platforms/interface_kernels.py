"""Ops and kernels. An op is its numpy reference, its cases and its tolerance; a kernel is one
provider's way to compute it, with a predicate that says why not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

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
    float32: frozenset[str] = frozenset()  # arguments that are float32 whatever the dtype
    in_place: frozenset[str] = frozenset()  # arguments that a kernel changes and returns
    weights: str = ""  # the scheme of `weight`, where this contract is of quantised matrices
    kv_dtype: str = ""  # of the cache, where this contract is of attention over another dtype
    dims: Callable[[Mapping[str, Any]], Mapping[str, int]] | None = None  # of a case's Problem

    @property
    def title(self) -> str:
        """The name, and the scheme of its weights or the dtype of its cache behind a slash."""
        return "/".join(filter(None, (self.name, self.weights, self.kv_dtype)))


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
    # Schemes of weights that it is there for; empty: no matter. A model without a matrix in one of
    # them passes the kernel over, and that makes no fallback of its choice.
    schemes: frozenset[str] = frozenset()
    # How it rounds activations before a product of integers, "int8, a scale per token"; "": not.
    activations: str = ""
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


class CaseRunner(Protocol):
    """How one framework runs a conformance case: host arrays to the device, the call, and back.

    The case's floats are rounded to `dtype` already. Results are host arrays, floats as float32.
    Whatever goes wrong raises, a write outside the arguments and a changed input included.
    """

    def run_kernel(
        self, op: Op, kernel: Kernel, case: Case, dtype: str
    ) -> Sequence[NDArray[Any]]: ...

    def run_attention(
        self, backend: Any, case: Case, dtype: str, kv_dtype: str = ""
    ) -> Sequence[NDArray[Any]]:
        """`backend` is an AttentionBackend, the case one of the op "attention"; the cache keeps
        keys and values as `kv_dtype`, "" as `dtype`."""
        ...


@dataclass(frozen=True, slots=True)
class Subject:
    """One kernel or attention backend under one contract."""

    op: str  # title of the contract
    provider: str
    requires: Callable[[Case, str], str | None]  # (case, dtype) -> None, or why it is not for this
    run: Callable[[Case, str], Sequence[NDArray[Any]]]  # as a CaseRunner runs
    # Of a dtype: why it cannot be run here though it may be right, or "".
    unverified: Callable[[str], str] = lambda dtype: ""


@dataclass(frozen=True, slots=True)
class Suite:
    """All that a platform has under test, and what a pass of it proves."""

    device: str
    evidence: str  # "device", "interpreted", ...
    subjects: tuple[Subject, ...]
