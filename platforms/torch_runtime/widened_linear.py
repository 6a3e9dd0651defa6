"""The linear layer on stored forms that no other kernel serves: a matrix is kept in few bits and
widened at every call. It saves memory and costs time, so it serves when it is named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own spelling)
from torch import Tensor

from ...common.checkpoint.block_floats import E2M1, MX_BIAS, MX_GROUP, SQUARE, Fp8Blocks, Mxfp4Rows
from ...common.checkpoint.quantised_rows import QuantisedRows
from ...common.errors import KernelError
from ..interface import DeviceFacts
from ..interface_kernels import Kernel, KernelTable, Problem
from .device import TorchDevice

PROVIDER = "widened"
PRIORITY = -100
"""Below everything: matrices converted once, at load, are faster."""

SCHEMES = frozenset(
    "bfloat16 float16 gptq_int4 gptq_int8 awq_int4 int8_channel int8_token int8_group "
    "packed_int4 packed_int8 fp8_block mxfp4".split()
)


@dataclass(frozen=True, slots=True)
class GroupedInts:
    """QuantisedRows on a device. scale (N, groups, 1); minimum likewise or None."""

    q: Tensor
    scale: Tensor
    minimum: Tensor | None
    columns: int
    order: Tensor | None

    def dense(self) -> Tensor:
        values = self.q.view(*self.scale.shape[:2], -1) * self.scale
        values = values.view(self.q.shape)
        values = values if self.minimum is None else values - self.minimum
        values = values.flatten(1)[:, : self.columns]
        if self.order is None:
            return values
        return torch.empty_like(values).index_copy_(1, self.order, values)


@dataclass(frozen=True, slots=True)
class Fp8Squares:
    """Fp8Blocks on a device."""

    codes: Tensor  # float8_e4m3fn
    scales: Tensor

    def dense(self) -> Tensor:
        rows, columns = self.codes.shape
        wide = self.scales.repeat_interleave(SQUARE, 0)[:rows].repeat_interleave(SQUARE, 1)
        return self.codes.float() * wide[:, :columns]


@dataclass(frozen=True, slots=True)
class Mxfp4Groups:
    """Mxfp4Rows on a device, scales as numbers. `table` has the value of every nibble."""

    codes: Tensor
    scales: Tensor  # (N, groups, 1)
    table: Tensor

    def dense(self) -> Tensor:
        nibbles = torch.stack((self.codes & 15, self.codes >> 4), dim=-1)
        values = self.table[nibbles.int()].view(*self.scales.shape[:2], MX_GROUP)
        return (values * self.scales).flatten(1)


Form = GroupedInts | Fp8Squares | Mxfp4Groups


def linear(x: Tensor, weight: Tensor | Form, bias: Tensor | None = None) -> Tensor:
    dense = weight if isinstance(weight, Tensor) else weight.dense()
    return F.linear(x, dense.to(x.dtype), bias)


def prepare(weight: Any, problem: Problem, device: TorchDevice) -> Tensor | Form:
    """A stored matrix on the device; one in a dtype as it is."""
    if isinstance(weight, Tensor):
        return weight
    if isinstance(weight, QuantisedRows):
        return _grouped(weight, device)
    if isinstance(weight, Fp8Blocks):
        codes = device.to_device(weight.codes).view(torch.float8_e4m3fn)
        return Fp8Squares(codes, device.to_device(weight.scales))
    if isinstance(weight, Mxfp4Rows):
        scales = np.exp2(weight.scales.astype(np.float32) - MX_BIAS)[..., None]
        parts = (device.to_device(part) for part in (weight.codes, scales, E2M1))
        return Mxfp4Groups(*parts)
    raise KernelError(f"{PROVIDER!r} has no form for {type(weight).__name__}.")


def _grouped(weight: QuantisedRows, device: TorchDevice) -> GroupedInts:
    q = weight.q
    if weight.bits == 4 and weight.minimum is None:
        q = q.astype(np.int8) - np.int8(8)
    order = None if weight.order is None else device.to_device(weight.order)
    minimum = None if weight.minimum is None else device.to_device(weight.minimum[..., None])
    scale = device.to_device(weight.scale[..., None])
    return GroupedInts(device.to_device(q), scale, minimum, weight.columns, order)


def _requires(facts: DeviceFacts, problem: Problem) -> str | None:
    if problem.weights and problem.weights not in SCHEMES:
        return f"has no {problem.weights} weights"
    return None


def refuse_widening(table: KernelTable, named: Mapping[str, str]) -> None:
    """Raises KernelError where a table would widen matrices at every step and nobody asked so."""
    kernel = table.kernels.get("linear")
    if kernel is not None and kernel.provider == PROVIDER and "linear" not in named:
        raise KernelError(
            f"{PROVIDER}: would widen every matrix anew at each step; "
            f"--kernel linear={PROVIDER} does so, to save memory"
        )


def widened_linear(device: TorchDevice) -> Kernel:
    def on_device(weight: Any, problem: Problem) -> Tensor | Form:
        return prepare(weight, problem, device)

    return Kernel("linear", PROVIDER, _requires, linear, PRIORITY, prepare=on_device)
