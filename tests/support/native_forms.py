"""Every form of weight that the native kernels read, and the levels that this machine runs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sixfold.platforms.cpu import packing
from sixfold.platforms.cpu.native_library import usable_levels
from sixfold.platforms.cpu.packing import PackedWeight
from sixfold.platforms.machine import observe

HERE = usable_levels(observe().cpu_features)


def _bf16(weight: Tensor) -> PackedWeight:
    return packing.pack_floats(weight.bfloat16())


def _f16(weight: Tensor) -> PackedWeight:
    return packing.pack_floats(weight.half())


def _int4_without_minimum(weight: Tensor) -> PackedWeight:
    n, k = weight.shape
    groups = -(-k // packing.GROUP)
    q = torch.randint(0, 16, (n, groups, packing.GROUP))
    return packing.pack_int4(q, torch.rand(n, groups), None, weight.shape)


def _int8_extremes(weight: Tensor) -> PackedWeight:
    """All weights -128, as a file may hold: what a 16-bit sum of two products must survive."""
    n, k = weight.shape
    groups = -(-k // packing.GROUP)
    q = torch.full((n, groups, packing.GROUP), -128)
    return packing.pack_int8(q, torch.rand(n, groups), weight.shape)


def _int8_by_sixteen(weight: Tensor) -> PackedWeight:
    n, k = weight.shape
    groups = -(-k // packing.GROUP)
    q = torch.randint(-128, 128, (n, groups, packing.GROUP))
    return packing.pack_int8(q, torch.rand(n, 2 * groups), weight.shape)


def _int8_with_minimum(weight: Tensor) -> PackedWeight:
    n, k = weight.shape
    groups = -(-k // packing.GROUP)
    q = torch.randint(0, 32, (n, groups, packing.GROUP))
    return packing.pack_int8(q, torch.rand(n, groups), weight.shape, torch.randn(n, groups))


FORMS: list[Callable[[Tensor], PackedWeight]] = [
    packing.pack_floats,
    _bf16,
    _f16,
    packing.quantise_int8,
    _int8_extremes,
    _int8_by_sixteen,
    _int8_with_minimum,
    packing.quantise_int4,
    _int4_without_minimum,
]
