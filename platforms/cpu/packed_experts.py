"""The matrices of a layer's experts as one packed stack, for the native kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...common.errors import KernelError
from ..torch_runtime.rounding import GROUP
from .native_library import WeightStruct
from .packing import INT4, PANEL, PackedWeight
from .packing import dismantle as dismantle_matrix
from .packing import restore as restore_matrix


@dataclass(frozen=True, eq=False)
class PackedExperts:
    """`count` matrices (n, k), each beginning with a panel of its own, in one PackedWeight."""

    count: int
    n: int
    stack: PackedWeight  # (count * n rounded up to whole panels, k)

    @property
    def k(self) -> int:
        return self.stack.shape[1]

    @property
    def quantised(self) -> bool:
        return self.stack.quantised

    @cached_property
    def _structs(self) -> Any:
        """One WeightStruct each; they live as long as this object."""
        stack = self.stack
        parts = (stack.data, stack.scales, stack.mins)
        # Bytes between one matrix and the next; none where there is no such part.
        steps = [0 if part is None else part.nbytes // self.count for part in parts]
        starts = [None if part is None else part.data_ptr() for part in parts]
        structs = (WeightStruct * self.count)()
        for i in range(self.count):
            at = (
                None if start is None else start + i * step
                for start, step in zip(starts, steps, strict=True)
            )
            has_min = int(stack.mins is not None)
            structs[i] = WeightStruct(stack.format, self.n, self.k, has_min, *at, None)
        return structs

    @property
    def address(self) -> int:
        return ctypes.addressof(self._structs)


def join(matrices: Iterable[PackedWeight]) -> PackedExperts:
    """Matrices of one shape, packed in one form. Raises KernelError for columns out of order."""
    packed = list(matrices)
    if any(matrix.order is not None for matrix in packed):
        raise KernelError("Experts with columns out of order (desc_act) are not served.")
    if any(matrix.mins is not None for matrix in packed):
        packed = [_with_minimum(matrix) for matrix in packed]
    first = packed[0]
    n, k = first.shape
    whole: dict[str, Any] = {
        name: torch.cat([getattr(matrix, name) for matrix in packed])
        for name in ("data", "scales", "mins")
        if getattr(first, name) is not None
    }
    rows = len(packed) * -(-n // PANEL) * PANEL
    return PackedExperts(len(packed), n, PackedWeight(first.format, (rows, k), **whole))


def _with_minimum(matrix: PackedWeight) -> PackedWeight:
    """The same numbers in the form with minimums: a file may give them to some experts only."""
    if matrix.mins is not None or matrix.scales is None:
        return matrix
    groups = -(-matrix.shape[1] // GROUP)
    zero = 8 if matrix.format == INT4 else 0
    return replace(matrix, mins=matrix.scales[:, :groups] * zero, structs={})


def dismantle(experts: PackedExperts) -> tuple[dict[str, Any], dict[str, Tensor]]:
    facts, tensors = dismantle_matrix(experts.stack)
    return {**facts, "count": experts.count, "n": experts.n}, tensors


def restore(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> PackedExperts:
    return PackedExperts(facts["count"], facts["n"], restore_matrix(facts, tensors))
