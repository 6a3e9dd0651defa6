"""Comparing a kernel with the generic one before it is used. What cannot be tested where it is
written is tested where it runs: at every start, on the cases of its op's contract."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from ....common.ops import OPS
from ....common.ops.conformance import as_list, difference
from ...interface_kernels import Case
from ..conformance import arguments, to_numpy


def refusal(
    op: str, candidate: Callable[..., Any], trusted: Callable[..., Any], dtype: mx.Dtype
) -> str | None:
    """Why `candidate` must not serve: the first case in which it fails or differs from `trusted` by
    more than the op's tolerance. None when it agrees in all of them."""
    for case in OPS[op].cases(np.random.default_rng(0)):
        try:
            made = _run(candidate, op, case, dtype)
        except Exception as error:
            return f"it fails on this device, case {case.name!r}: {_first_line(error)}"
        apart = _difference(op, made, _run(trusted, op, case, dtype), dtype)
        if apart:
            return f"it differs from the generic kernel on this device, case {case.name!r}: {apart}"
    return None


def _run(fn: Callable[..., Any], op: str, case: Case, dtype: mx.Dtype) -> list[mx.array]:
    found = fn(**arguments(OPS[op], case.args, dtype))
    arrays = as_list(found)
    mx.eval(arrays)
    return arrays


def _difference(op: str, made: list[mx.array], wanted: list[mx.array], dtype: mx.Dtype) -> str:
    tolerance = OPS[op].tolerance[str(dtype).removeprefix("mlx.core.")]
    for a, b in zip(made, wanted, strict=True):
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return f"{a.dtype} {a.shape} instead of {b.dtype} {b.shape}"
        apart = difference([to_numpy(a)], [to_numpy(b)], tolerance)[1]
        if apart:
            return apart
    return ""


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
