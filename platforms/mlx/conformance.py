"""Conformance cases on MLX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ...common.errors import ConformanceError
from ...common.ops.conformance import as_list, is_float
from ...common.ops.suite import problem_of
from ..interface_kernels import Case, Kernel, Op
from .loading import DTYPES

NARROW = {np.dtype(np.int64): np.int32}


class MLXRunner:
    """The CaseRunner of MLX. Arrays are values here: what an op changes in place it returns."""

    def run_kernel(self, op: Op, kernel: Kernel, case: Case, dtype: str) -> Sequence[NDArray[Any]]:
        args = arguments(op, case.args, DTYPES[dtype])
        if op.weights and kernel.prepare is not None:
            args["weight"] = kernel.prepare(case.args["weight"], problem_of(op, case, dtype))
        return [to_numpy(found) for found in as_list(kernel.fn(**args))]

    def run_attention(
        self, backend: Any, case: Case, dtype: str, kv_dtype: str = ""
    ) -> Sequence[NDArray[Any]]:
        raise ConformanceError("MLX has no attention backends: mlx-lm's models attend themselves")


def arguments(op: Op, given: Mapping[str, Any], dtype: mx.Dtype) -> dict[str, Any]:
    """A case's arguments as a kernel of this platform takes them."""
    return {
        name: _array(value, mx.float32 if name in op.float32 else dtype)
        if isinstance(value, np.ndarray)
        else value
        for name, value in given.items()
    }


def _array(value: NDArray[Any], floats: mx.Dtype) -> mx.array:
    array = mx.array(value.astype(NARROW.get(value.dtype, value.dtype), copy=False))
    return array.astype(floats) if is_float(value) else array


def to_numpy(found: mx.array) -> NDArray[Any]:
    """On the host; floats as float32."""
    floats = mx.issubdtype(found.dtype, mx.floating)
    return np.array(found.astype(mx.float32) if floats else found)
