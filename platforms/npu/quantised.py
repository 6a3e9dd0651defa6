"""The linear layer on stored integers through torch_npu: `npu_weight_quant_batchmatmul`, which
widens them on the way to the product (pages of op-plugin; not yet run on a device).

The op keeps scales in the dtype of the activations. A scale per output goes there as its power of
two, and the rest of it is multiplied into the result, so that no dtype rounds it; scales of groups
have no such way out, and serve where float16 has them; those made on load are made in the dtype.

It has no more than 65535 outputs: a matrix of more, a head's, is cut into equal parts, a call each.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own spelling)
from torch import Tensor

from ...common.checkpoint.quantised_rows import GROUP, QuantisedRows
from ...common.errors import KernelError
from ..interface import DeviceFacts
from ..interface_kernels import Kernel, Problem
from ..torch_runtime.device import TorchDevice
from ..torch_runtime.kernels import embedding as look_up
from ..torch_runtime.rounding import round_int8
from ..torch_runtime.stored_integers import scales_by_group, whole_zeros
from .library import PACKAGE, PRIORITY, refusal

WIDEST = 65535
"""Inputs and outputs of one call."""
PAIRED = 8
"""Numbers of four bits in an int32."""
CHANNEL = frozenset({"int8_channel", "int8_token"})
GROUPED = frozenset(
    {"int8", "int8_group", "gptq_int4", "gptq_int8", "awq_int4", "packed_int4", "packed_int8"}
)
ROUNDED = frozenset({"int8"})
"""Made on load, and the form of such a model's embedding too."""


@dataclass(frozen=True, slots=True, eq=False)
class IntMatrix:
    """A matrix (outputs, k) in parts of n outputs each, the last filled up: (parts, k, n) int8, or
    (parts, k, n / 8) int32 of eight numbers each. value = (number + offset) * scale * rest."""

    weight: Tensor
    scale: Tensor  # (parts, 1 or groups, n), in the dtype of the activations
    offset: Tensor | None  # as scale
    group: int  # columns that share a scale; 0 is all
    outputs: int
    rest: Tensor | None = None  # (outputs,) float32
    order: Tensor | None = None


def linear(x: Tensor, weight: Tensor | IntMatrix, bias: Tensor | None = None) -> Tensor:
    """Of no rows the page says that they are not taken."""
    if isinstance(weight, Tensor):
        return F.linear(x, weight, bias)
    if not x.numel():
        return x.new_empty((len(x), weight.outputs))
    if weight.order is not None:
        x = x.index_select(1, weight.order)
    parts, _, n = weight.scale.shape
    plain = weight.rest is None and parts * n == weight.outputs
    wide = torch.float32 if x.dtype == torch.bfloat16 else x.dtype
    inside = bias.to(wide).view(parts, n) if plain and bias is not None else None
    result = _product(x, weight, inside)
    if plain:
        return result
    result = result[:, : weight.outputs]
    if weight.rest is not None:
        result = result.float() * weight.rest
    result = result if bias is None else result + bias
    return result.to(x.dtype)


def _product(x: Tensor, weight: IntMatrix, bias: Tensor | None) -> Tensor:
    """(T, parts * n). `bias` (parts, n) or None."""
    multiply = import_module(PACKAGE).npu_weight_quant_batchmatmul
    results: list[Tensor] = [
        multiply(
            x,
            weight.weight[part],
            weight.scale[part],
            None if weight.offset is None else weight.offset[part],
            bias=None if bias is None else bias[part],
            antiquant_group_size=weight.group,
        )
        for part in range(len(weight.weight))
    ]
    return results[0] if len(results) == 1 else torch.cat(results, dim=1)


def embedding(ids: Tensor, table: Tensor | IntMatrix, scale: float = 1.0) -> Tensor:
    """By torch: the library looks up no rows of integers."""
    if isinstance(table, Tensor):
        return look_up(ids, table, scale)
    numbers = table.weight.transpose(1, 2).flatten(0, 1).index_select(0, ids)
    n = table.scale.shape[2]
    steps = table.scale[ids // n, :, ids % n].float()
    if table.group:
        steps = steps.repeat_interleave(table.group, dim=1)[:, : numbers.shape[1]]
    return (numbers.float() * steps * scale).to(table.scale.dtype)


def prepare(weight: Any, problem: Problem, device: TorchDevice) -> Tensor | IntMatrix:
    """A checkpoint's rows as the op reads them, or a tensor rounded; one without a scheme as it is.
    Raises KernelError."""
    dtype = getattr(torch, problem.dtype)
    if isinstance(weight, Tensor):
        if problem.weights not in ROUNDED:
            return weight
        # Scales that the op can keep, so that numbers are right for them.
        q, steps = (part.float().cpu().numpy() for part in round_int8(weight, dtype))
        weight = QuantisedRows(8, q.astype(np.int8), steps, None, weight.shape[1])
    if not isinstance(weight, QuantisedRows):
        raise KernelError(f"{PACKAGE!r} has no form for {type(weight).__name__}.")
    numbers = torch.from_numpy(weight.q).to(torch.int32)
    scale = scales_by_group(weight, PACKAGE)
    offset = _offset(weight, scale)
    if weight.bits == 4:
        numbers = numbers - 8
    numbers = numbers.flatten(1)[:, : weight.columns]
    group = 0 if bool((scale == scale[:, :1]).all()) and _uniform(offset) else GROUP
    if group and group >= weight.columns:
        group = 0
    if not group:
        scale, offset = scale[:, :1], None if offset is None else offset[:, :1]
    kept, rest = _split(scale, dtype, bool(group))
    given = [kept] if offset is None else [kept, offset]
    flat = [in_parts(rows.t(), weight.bits).to(dtype) for rows in given]
    order = None if weight.order is None else device.to_device(weight.order)
    return IntMatrix(
        numbers_on_device(numbers, weight.bits, device),
        device.to_device(flat[0]),
        device.to_device(flat[1]) if offset is not None else None,
        group,
        len(weight.q),
        None if rest is None else device.to_device(rest),
        order,
    )


def _offset(weight: QuantisedRows, scale: Tensor) -> Tensor | None:
    """What is added to numbers (-8 to 7 of four bits)."""
    zeros = whole_zeros(weight, scale, PACKAGE)
    return None if zeros is None else (8 if weight.bits == 4 else 0) - zeros


def _uniform(offset: Tensor | None) -> bool:
    return offset is None or bool((offset == offset[:, :1]).all())


def _split(scale: Tensor, dtype: torch.dtype, grouped: bool) -> tuple[Tensor, Tensor | None]:
    """(what the op keeps, what is left to multiply). Raises KernelError."""
    if torch.equal(scale.to(dtype).float(), scale):
        return scale, None
    if grouped:
        raise KernelError(f"{PACKAGE!r} keeps scales of groups in {dtype}, which rounds these.")
    power = torch.exp2(torch.floor(torch.log2(scale.clamp(min=2.0**-24))))
    return power, (scale / power)[:, 0].contiguous()


def in_parts(columns: Tensor, bits: int) -> Tensor:
    """(k, outputs) -> (parts, k, n) of as few parts as the op needs, filled up with zeros."""
    outputs, step = columns.shape[1], PAIRED if bits == 4 else 1
    parts = -(-outputs // (WIDEST // step * step))
    n = -(-outputs // (parts * step)) * step
    whole = F.pad(columns, (0, parts * n - outputs))
    return whole.unflatten(1, (parts, n)).transpose(0, 1).contiguous()


def numbers_on_device(numbers: Tensor, bits: int, device: TorchDevice) -> Tensor:
    """(outputs, k) int32 -> (parts, k, n): eight bits as a transposed view, as the page recommends;
    four bits packed by the library, which keeps its order to itself."""
    parts = in_parts(numbers.t(), bits)
    if bits == 8:
        return device.to_device(parts.to(torch.int8).transpose(1, 2).contiguous()).transpose(1, 2)
    pack = import_module(PACKAGE).npu_convert_weight_to_int4pack
    return torch.stack([pack(device.to_device(part)) for part in parts])


def _requires(facts: DeviceFacts, problem: Problem) -> str | None:
    reason = refusal(facts)
    if reason is not None or not problem.weights:
        return reason
    if problem.weights not in CHANNEL | GROUPED:
        return f"has no {problem.weights} weights"
    if problem.dtype not in ("float16", "bfloat16"):
        return f"takes float16 and bfloat16, not {problem.dtype}"
    if problem.weights in GROUPED - ROUNDED and problem.dtype != "float16":
        return f"would round scales of groups to {problem.dtype}; --dtype float16 keeps them"
    if problem.dims.get("k", 1) > WIDEST:
        return f"k is up to {WIDEST}, not {problem.dims['k']}"
    return None


def _requires_rows(facts: DeviceFacts, problem: Problem) -> str | None:
    if problem.weights and problem.weights not in ROUNDED:
        return f"has no {problem.weights} weights"
    return _requires(facts, problem)


def kernels(device: TorchDevice) -> tuple[Kernel, ...]:
    def on_device(weight: Any, problem: Problem) -> Tensor | IntMatrix:
        return prepare(weight, problem, device)

    return (
        Kernel(
            "linear", PACKAGE, _requires, linear, PRIORITY,
            schemes=CHANNEL | GROUPED, prepare=on_device,
        ),
        Kernel(
            "embedding", PACKAGE, _requires_rows, embedding, PRIORITY,
            schemes=ROUNDED, prepare=on_device,
        ),
    )  # fmt: skip
