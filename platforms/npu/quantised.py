"""The linear layer on stored integers through torch_npu: `npu_weight_quant_batchmatmul`, which
widens them on the way to the product (pages of op-plugin; not yet run on a device), and, by name
only, `npu_dynamic_quant` with `npu_quant_matmul`, which rounds activations to eight bits with one
scale a row: coarser than the scale per 32 that the contract of stored matrices allows.

The op keeps scales in the dtype of the activations. A scale per output goes there as its power of
two, and the rest of it is multiplied into the result, so that no dtype rounds it; scales of groups
have no such way out, and serve where float16 has them.
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

BY_NAME = "torch_npu_w8a8"
LAST = -50
WIDEST = 65535
PAIRED = 8
"""Numbers of four bits in an int32."""
CHANNEL = frozenset({"int8_channel"})
GROUPED = frozenset(
    {"int8", "int8_group", "gptq_int4", "gptq_int8", "awq_int4", "packed_int4", "packed_int8"}
)
ROUNDED = frozenset({"int8"})
"""Made on load, and the form of such a model's embedding too."""


@dataclass(frozen=True, slots=True, eq=False)
class IntMatrix:
    """A matrix (n, k). `weight` (k, n) int8, or (k, n / 8) int32 of eight numbers each with n
    padded to 8; value = (number + offset) * scale * rest."""

    weight: Tensor
    scale: Tensor  # (1, n) or (groups, n), in the dtype of the activations
    offset: Tensor | None  # as scale
    group: int  # columns that share a scale; 0 is all
    outputs: int
    rest: Tensor | None = None  # (n,) float32
    order: Tensor | None = None


def linear(x: Tensor, weight: Tensor | IntMatrix, bias: Tensor | None = None) -> Tensor:
    """Of no rows the page says that they are not taken."""
    if isinstance(weight, Tensor):
        return F.linear(x, weight, bias)
    if not x.numel():
        return x.new_empty((len(x), weight.outputs))
    if weight.order is not None:
        x = x.index_select(1, weight.order)
    plain = weight.rest is None and weight.scale.shape[1] == weight.outputs
    wide = torch.float32 if x.dtype == torch.bfloat16 else x.dtype
    inside = bias.to(wide).contiguous() if plain and bias is not None else None
    result: Tensor = import_module(PACKAGE).npu_weight_quant_batchmatmul(
        x, weight.weight, weight.scale, weight.offset, bias=inside,
        antiquant_group_size=weight.group,
    )  # fmt: skip
    if plain:
        return result
    result = result[:, : weight.outputs]
    if weight.rest is not None:
        result = result.float() * weight.rest
    result = result if bias is None else result + bias
    return result.to(x.dtype)


def linear_in_eight_bits(
    x: Tensor, weight: Tensor | IntMatrix, bias: Tensor | None = None
) -> Tensor:
    if isinstance(weight, Tensor):
        return F.linear(x, weight, bias)
    if not x.numel():
        return x.new_empty((len(x), weight.outputs))
    if weight.order is not None:
        x = x.index_select(1, weight.order)
    library = import_module(PACKAGE)
    rounded, steps = library.npu_dynamic_quant(x)
    scale = weight.scale[0].float()
    result: Tensor = library.npu_quant_matmul(
        rounded,
        weight.weight,
        scale if weight.rest is None else scale * weight.rest,
        pertoken_scale=steps,
        bias=None if bias is None else bias.float(),
        output_dtype=x.dtype,
    )
    return result


def embedding(ids: Tensor, table: Tensor | IntMatrix, scale: float = 1.0) -> Tensor:
    """By torch: the library looks up no rows of integers."""
    if isinstance(table, Tensor):
        return look_up(ids, table, scale)
    numbers = table.weight.t().index_select(0, ids)
    steps = table.scale.t().index_select(0, ids).float()
    if table.group:
        steps = steps.repeat_interleave(table.group, dim=1)[:, : numbers.shape[1]]
    return (numbers.float() * steps * scale).to(table.scale.dtype)


def prepare(weight: Any, problem: Problem, device: TorchDevice) -> Tensor | IntMatrix:
    """A checkpoint's rows as the op reads them, or a tensor rounded; one without a scheme as it is.
    Raises KernelError."""
    if isinstance(weight, Tensor):
        if problem.weights not in ROUNDED:
            return weight
        q, steps = (part.cpu().numpy() for part in round_int8(weight))
        weight = QuantisedRows(8, q.astype(np.int8), steps, None, weight.shape[1])
    if not isinstance(weight, QuantisedRows):
        raise KernelError(f"{PACKAGE!r} has no form for {type(weight).__name__}.")
    dtype = getattr(torch, problem.dtype)
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
    parts = [kept] if offset is None else [kept, offset]
    flat = [_padded(part.t(), weight.bits).to(dtype).contiguous() for part in parts]
    order = None if weight.order is None else device.to_device(weight.order)
    return IntMatrix(
        _numbers(numbers, weight.bits, device),
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


def _padded(columns: Tensor, bits: int) -> Tensor:
    missing = -columns.shape[1] % PAIRED if bits == 4 else 0
    return F.pad(columns, (0, missing)) if missing else columns


def _numbers(numbers: Tensor, bits: int, device: TorchDevice) -> Tensor:
    """(n, k) int32 -> (k, n): eight bits as a transposed view, as the page recommends; four bits
    packed by the library, which keeps its order to itself."""
    if bits == 8:
        return device.to_device(numbers.to(torch.int8).contiguous()).t()
    whole = device.to_device(_padded(numbers.t(), bits).contiguous())
    packed: Tensor = import_module(PACKAGE).npu_convert_weight_to_int4pack(whole)
    return packed


def _requires(facts: DeviceFacts, problem: Problem) -> str | None:
    reason = refusal(facts)
    if reason is not None or not problem.weights:
        return reason
    if problem.weights not in CHANNEL | GROUPED:
        return f"has no {problem.weights} weights"
    if problem.dtype not in ("float16", "bfloat16"):
        return f"takes float16 and bfloat16, not {problem.dtype}"
    if problem.weights in GROUPED and problem.dtype != "float16":
        return f"would round scales of groups to {problem.dtype}; --dtype float16 keeps them"
    for side in ("k", "n"):
        if problem.dims.get(side, 1) > WIDEST:
            return f"{side} is up to {WIDEST}, not {problem.dims[side]}"
    return None


def _requires_rows(facts: DeviceFacts, problem: Problem) -> str | None:
    if problem.weights and problem.weights not in ROUNDED:
        return f"has no {problem.weights} weights"
    return _requires(facts, problem)


def _requires_by_name(facts: DeviceFacts, problem: Problem) -> str | None:
    if problem.weights not in CHANNEL | {""}:
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
        Kernel(
            "linear", BY_NAME, _requires_by_name, linear_in_eight_bits, LAST,
            schemes=CHANNEL, prepare=on_device,
        ),
    )  # fmt: skip
