"""The linear layer on stored integers through oneDNN, as torch 2.13 offers it on XPU: four bits,
widened on the way to the product, by `_weight_int4pack_mm_with_scales_and_zeros`; and eight bits by
eight bits, by `_int_mm`, for checkpoints that ask for activations rounded with a scale per token.

Source of what they take: `aten/src/ATen/native/mkldnn/xpu/Blas.cpp`. Neither has run on a device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own spelling)
from torch import Tensor

from ...common.checkpoint.quantised_rows import GROUP, QuantisedRows
from ...common.errors import KernelError
from ..interface import DeviceFacts
from ..interface_kernels import Kernel, Problem
from ..judgement import numbers
from ..torch_runtime.activation_rounding import AS_ASKED, BY_TOKEN
from ..torch_runtime.device import TorchDevice
from ..torch_runtime.stored_integers import bytes_by_output, scales_by_group, whole_zeros

PROVIDER, IN_BYTES = "onednn", "onednn_w8a8"
PRIORITY = 5
"""Below Triton's kernels, of which more forms and dtypes are known to be right."""
ABOVE_TRITON = 15
"""Triton's product of widened integers serves such a checkpoint too, and rounds less."""
INT4 = frozenset({"gptq_int4", "awq_int4", "packed_int4"})
OLDEST = (2, 13)
"""The torch whose operations these were written against."""
MIDDLE = 8


@dataclass(frozen=True, slots=True, eq=False)
class Int4Matrix:
    """value = (number - zero) * scale, columns filled up to whole groups."""

    data: Tensor  # (n, k / 8) int32: eight numbers each, the first in the lowest bits
    scale: Tensor  # (k / group, n) in the dtype of the activations
    zeros: Tensor  # (k / group, n) int8
    group: int
    order: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class Int8Matrix:
    data: Tensor  # (n, k) int8
    scale: Tensor  # (n,) float32
    order: Tensor | None


def linear(x: Tensor, weight: Tensor | Int4Matrix, bias: Tensor | None = None) -> Tensor:
    if isinstance(weight, Tensor):
        return F.linear(x, weight, bias)
    if not x.numel():
        return x.new_empty((len(x), len(weight.data)))
    if weight.order is not None:
        x = x.index_select(1, weight.order)
    missing = 8 * weight.data.shape[1] - x.shape[1]
    x = F.pad(x, (0, missing)) if missing else x.contiguous()
    result: Tensor = torch.ops.aten._weight_int4pack_mm_with_scales_and_zeros(
        x, weight.data, weight.group, weight.scale, weight.zeros
    )
    return result if bias is None else result + bias


def linear_in_eight_bits(
    x: Tensor, weight: Tensor | Int8Matrix, bias: Tensor | None = None
) -> Tensor:
    if isinstance(weight, Tensor):
        return F.linear(x, weight, bias)
    if not x.numel():
        return x.new_empty((len(x), len(weight.data)))
    if weight.order is not None:
        x = x.index_select(1, weight.order)
    wide = x.float()
    most = wide.abs().amax(dim=-1, keepdim=True)
    # Of what is not finite a whole number says nothing: its row is NaN by its scale.
    step = torch.where(most < torch.inf, most, torch.nan) / 127
    rounded = (wide / torch.where(step > 0, step, 1.0)).nan_to_num(0, 0, 0).round().to(torch.int8)
    result = torch._int_mm(rounded, weight.data.t()).float() * step * weight.scale
    return (result if bias is None else result + bias.float()).to(x.dtype)


def prepare(weight: Any, problem: Problem, device: TorchDevice) -> Tensor | Int4Matrix:
    """A checkpoint's rows as the operation reads them; a tensor as it is. Raises KernelError."""
    if isinstance(weight, Tensor):
        return weight
    if not isinstance(weight, QuantisedRows) or weight.bits != 4:
        raise KernelError(f"{PROVIDER!r} has no form for {type(weight).__name__}.")
    dtype = getattr(torch, problem.dtype)
    scale = scales_by_group(weight, PROVIDER)
    if not torch.equal(scale.to(dtype).float(), scale):
        raise KernelError(f"{PROVIDER!r} keeps scales in {dtype}, which rounds these.")
    zeros = whole_zeros(weight, scale, PROVIDER)
    zeros = torch.full_like(scale, MIDDLE) if zeros is None else zeros
    group = GROUP
    while scale.shape[1] % 2 == 0 and _alike(scale) and _alike(zeros):
        scale, zeros, group = scale[:, ::2], zeros[:, ::2], 2 * group
    codes = torch.from_numpy(weight.q).flatten(1)
    data = (codes[:, 1::2] << 4 | codes[:, ::2]).contiguous().view(torch.int32)
    return Int4Matrix(
        device.to_device(data),
        device.to_device(scale.t().to(dtype).contiguous()),
        device.to_device(zeros.t().to(torch.int8).contiguous()),
        group,
        None if weight.order is None else device.to_device(weight.order),
    )


def _alike(groups: Tensor) -> bool:
    return torch.equal(groups[:, ::2], groups[:, 1::2])


def prepare_eight_bits(weight: Any, problem: Problem, device: TorchDevice) -> Tensor | Int8Matrix:
    """Raises KernelError."""
    if isinstance(weight, Tensor):
        return weight
    numbers, scale, order = bytes_by_output(weight, IN_BYTES)
    placed = None if order is None else device.to_device(order)
    return Int8Matrix(device.to_device(numbers), device.to_device(scale), placed)


def _written_for(facts: DeviceFacts) -> str | None:
    version = facts.libraries.get("torch", "")
    if numbers(version)[:2] < OLDEST:
        return f"written for torch {'.'.join(map(str, OLDEST))}, there is {version or 'none'}"
    return None


def _requires(facts: DeviceFacts, problem: Problem) -> str | None:
    if problem.weights and problem.weights not in INT4:
        return f"has no {problem.weights} weights"
    if problem.weights and problem.dtype != "float16":
        return f"would round scales of groups to {problem.dtype}; --dtype float16 keeps them"
    return _written_for(facts)


def _requires_in_bytes(facts: DeviceFacts, problem: Problem) -> str | None:
    if problem.weights not in ("", BY_TOKEN):
        return f"rounds activations, which {problem.weights} weights do not ask for"
    return _written_for(facts)


def kernels(device: TorchDevice) -> tuple[Kernel, ...]:
    def four(weight: Any, problem: Problem) -> Tensor | Int4Matrix:
        return prepare(weight, problem, device)

    def eight(weight: Any, problem: Problem) -> Tensor | Int8Matrix:
        return prepare_eight_bits(weight, problem, device)

    return (
        Kernel("linear", PROVIDER, _requires, linear, PRIORITY, schemes=INT4, prepare=four),
        Kernel(
            "linear", IN_BYTES, _requires_in_bytes, linear_in_eight_bits, ABOVE_TRITON,
            schemes=frozenset({BY_TOKEN}), prepare=eight, activations=AS_ASKED,
        ),
    )  # fmt: skip
