"""The conformance run: every case of an op's contract, in every dtype, against its numpy reference.

Numpy only: what a framework adds is a CaseRunner, see `suite.py`. A case's floats are rounded to
the dtype first, so that reference and kernel see the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...platforms.interface_kernels import Case, Op, Subject, Suite, Tolerance
from ..errors import KernelError
from .contract import F32

DTYPES = ("float32", "bfloat16", "float16")
SHOWN_FAILURES = 3
"""Failures of a subject that are kept word for word."""


@dataclass(frozen=True, slots=True)
class Failure:
    case: str
    dtype: str
    error: float  # largest absolute difference; NaN where it is not a matter of size
    message: str


@dataclass(slots=True)
class Verdict:
    """What is known of one subject after its cases. A case in two dtypes counts twice."""

    op: str
    provider: str
    passed: int = 0
    failed: int = 0
    # dtype -> largest absolute difference, of those cases that passed.
    errors: dict[str, float] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)  # why cases are not for it -> how many
    unverified: dict[str, int] = field(default_factory=dict)  # why cases cannot be run here
    failures: list[Failure] = field(default_factory=list)  # the first few

    @property
    def status(self) -> str:
        """ "pass", "fail", "unverified" or "unsupported"."""
        if self.failed:
            return "fail"
        if self.passed:
            return "pass"
        return "unverified" if self.unverified else "unsupported"

    @property
    def executed(self) -> int:
        return self.passed + self.failed


def run_suite(
    suite: Suite,
    ops: Mapping[str, Op],
    progress: Callable[[str], None] = lambda title: None,
    seed: int = 0,
) -> list[Verdict]:
    """One verdict per subject of an op in `ops`, in the order of `ops`. `progress` is told the
    title of each op before its cases run."""
    verdicts = []
    for title, op in ops.items():
        subjects = [subject for subject in suite.subjects if subject.op == title]
        if subjects:
            progress(title)
            verdicts += check_op(op, subjects, seed)
    return verdicts


def check_op(
    op: Op, subjects: Sequence[Subject], seed: int = 0, dtypes: Sequence[str] = DTYPES
) -> list[Verdict]:
    verdicts = [Verdict(subject.op, subject.provider) for subject in subjects]
    pairs = list(zip(subjects, verdicts, strict=True))
    for case, dtype in cases_of(op, dtypes, seed):
        expected: list[NDArray[Any]] | None = None
        for subject, verdict in pairs:
            if not _runs(subject, verdict, case, dtype):
                continue
            if expected is None:
                expected = as_list(op.reference(**case.args))
            try:
                error, message = _outcome(op, subject, case, dtype, expected)
            except KernelError as refusal:  # of what `requires` cannot see, a size of pages
                _count(verdict.refused, str(refusal))
            else:
                _record(verdict, case, dtype, error, message)
    return verdicts


def cases_of(op: Op, dtypes: Sequence[str], seed: int = 0) -> Iterator[tuple[Case, str]]:
    """Every case in every dtype, its floats rounded; but only once where no dtype reaches it."""
    for dtype in dtypes:
        for case in op.cases(np.random.default_rng(seed)):
            if dtype == dtypes[0] or _feels_dtype(op, case):
                yield round_case(op, case, dtype), dtype


def _feels_dtype(op: Op, case: Case) -> bool:
    return any(is_float(value) and name not in op.float32 for name, value in case.args.items())


def _runs(subject: Subject, verdict: Verdict, case: Case, dtype: str) -> bool:
    """What the device refuses is no question of where the suite runs, so that is asked first."""
    reason = subject.requires(case, dtype)
    if reason is not None:
        _count(verdict.refused, reason)
        return False
    if elsewhere := subject.unverified(dtype):
        _count(verdict.unverified, elsewhere)
        return False
    return True


def _count(reasons: dict[str, int], reason: str) -> None:
    reasons[reason] = reasons.get(reason, 0) + 1


def _outcome(
    op: Op, subject: Subject, case: Case, dtype: str, expected: Sequence[NDArray[Any]]
) -> tuple[float, str]:
    """Raises KernelError where the subject itself refuses the case."""
    try:
        got = subject.run(case, dtype)
    except KernelError:
        raise
    except Exception as error:  # a broken kernel may raise anything; the run goes on
        return float("nan"), f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return difference(got, expected, op.tolerance[dtype])


def _record(verdict: Verdict, case: Case, dtype: str, error: float, message: str) -> None:
    if not message:
        verdict.passed += 1
        verdict.errors[dtype] = max(verdict.errors.get(dtype, 0.0), error)
        return
    verdict.failed += 1
    if len(verdict.failures) < SHOWN_FAILURES:
        verdict.failures.append(Failure(case.name, dtype, error, message))


def difference(
    got: Sequence[NDArray[Any]], expected: Sequence[NDArray[Any]], tolerance: Tolerance
) -> tuple[float, str]:
    """(largest absolute difference, what is wrong or ""). NaN equals NaN, an infinity itself."""
    if len(got) != len(expected):
        return float("nan"), f"{len(got)} results, the reference has {len(expected)}"
    largest, message = 0.0, ""
    for place, (have, want) in enumerate(zip(got, expected, strict=True)):
        which = f"result {place}: " if len(expected) > 1 else ""
        if have.shape != want.shape:
            return float("nan"), f"{which}shape {have.shape}, not {want.shape}"
        left, right = have.astype(np.float64), want.astype(np.float64)
        close = np.isclose(left, right, tolerance.rtol, tolerance.atol, equal_nan=True)
        with np.errstate(invalid="ignore"):
            apart = np.abs(left - right)
        apart = apart[np.isfinite(apart)]
        largest = max(largest, float(apart.max(initial=0.0)))
        if not close.all() and not message:
            at = tuple(int(i) for i in np.argwhere(~close)[0])
            message = (
                f"{which}{int((~close).sum())} of {close.size} elements differ, "
                f"first at {list(at)}: {left[at]:.6g}, not {right[at]:.6g}"
            )
    return largest, message


def round_case(op: Op, case: Case, dtype: str) -> Case:
    """The case as a kernel of this dtype sees it: float arrays rounded, but for `op.float32`."""
    rounded = {
        name: round_to(value, dtype) if is_float(value) and name not in op.float32 else value
        for name, value in case.args.items()
    }
    return Case(case.name, rounded)


def round_to(x: NDArray[Any], dtype: str) -> F32:
    """float32 values that `dtype` has, to nearest, ties to even."""
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return x.astype(np.float16).astype(np.float32)
    x = np.ascontiguousarray(x, np.float32)
    if dtype == "float32":
        return x
    bits = x.view(np.uint32)
    kept = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(
        0xFFFF0000
    )
    return np.where(np.isnan(x), x, kept.view(np.float32)).astype(np.float32)


def is_float(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind == "f"


def as_list(outcome: Any) -> list[Any]:
    """What a kernel or reference returned, one result or a tuple of them."""
    return list(outcome) if isinstance(outcome, tuple) else [outcome]
