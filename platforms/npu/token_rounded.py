"""The linear layer of checkpoints that ask for activations of eight bits, a scale per token:
`npu_dynamic_quant`, then `npu_quant_matmul` (pages of op-plugin; not yet run on a device). Other
checkpoints never get here: rounding is part of what this one was made for.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own spelling)
from torch import Tensor

from ..interface import DeviceFacts
from ..interface_kernels import Kernel, Problem
from ..torch_runtime.activation_rounding import AS_ASKED, BY_TOKEN
from ..torch_runtime.device import TorchDevice
from ..torch_runtime.stored_integers import bytes_by_output
from .library import PACKAGE, PRIORITY, refusal
from .quantised import WIDEST, in_parts, numbers_on_device

PROVIDER = "torch_npu_w8a8"
ABOVE = PRIORITY + 1
"""The library's product of widened integers serves such a checkpoint too, and rounds less."""


@dataclass(frozen=True, slots=True, eq=False)
class ByteMatrix:
    """A matrix (outputs, k) in parts of n outputs each, as `quantised.IntMatrix` is."""

    weight: Tensor  # (parts, k, n) int8
    scale: Tensor  # (parts, n) float32
    outputs: int
    order: Tensor | None


def linear(x: Tensor, weight: Tensor | ByteMatrix, bias: Tensor | None = None) -> Tensor:
    if isinstance(weight, Tensor):
        return F.linear(x, weight, bias)
    if not x.numel():
        return x.new_empty((len(x), weight.outputs))
    if weight.order is not None:
        x = x.index_select(1, weight.order)
    library = import_module(PACKAGE)
    rounded, steps = _rounded(x)
    parts, n = weight.scale.shape
    shifts = None
    if bias is not None:
        shifts = F.pad(bias.float(), (0, parts * n - weight.outputs)).view(parts, n)
    results: list[Tensor] = [
        library.npu_quant_matmul(
            rounded,
            weight.weight[part],
            weight.scale[part],
            pertoken_scale=steps,
            bias=None if shifts is None else shifts[part],
            output_dtype=x.dtype,
        )
        for part in range(parts)
    ]
    return results[0] if parts == 1 else torch.cat(results, dim=1)[:, : weight.outputs]


def _rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of rows that are zero or not finite the page says nothing: ones go in for them, and their own
    largest number is the scale that comes out, which gives bias alone and NaN."""
    most = x.abs().amax(dim=-1).float()
    usual = (most > 0) & (most < torch.inf)
    x = torch.where(usual.unsqueeze(1), x, torch.ones_like(x))
    rounded, steps = import_module(PACKAGE).npu_dynamic_quant(x)
    return rounded, torch.where(usual, steps, torch.where(most > 0, torch.nan, most))


def prepare(weight: Any, problem: Problem, device: TorchDevice) -> Tensor | ByteMatrix:
    """A checkpoint's rows as the op reads them; a tensor as it is. Raises KernelError."""
    if isinstance(weight, Tensor):
        return weight
    numbers, scale, order = bytes_by_output(weight, PROVIDER)
    return ByteMatrix(
        numbers_on_device(numbers, 8, device),
        device.to_device(in_parts(scale.unsqueeze(0), 8)[:, 0].contiguous()),
        len(numbers),
        None if order is None else device.to_device(order),
    )


def _requires(facts: DeviceFacts, problem: Problem) -> str | None:
    reason = refusal(facts)
    if reason is not None or not problem.weights:
        return reason
    if problem.weights != BY_TOKEN:
        return f"rounds activations, which {problem.weights} weights do not ask for"
    if problem.dtype not in ("float16", "bfloat16"):
        return f"takes float16 and bfloat16, not {problem.dtype}"
    if problem.dims.get("k", 1) > WIDEST:
        return f"k is up to {WIDEST}, not {problem.dims['k']}"
    return None


def kernel(device: TorchDevice) -> Kernel:
    def on_device(weight: Any, problem: Problem) -> Tensor | ByteMatrix:
        return prepare(weight, problem, device)

    return Kernel(
        "linear", PROVIDER, _requires, linear, ABOVE, schemes=frozenset({BY_TOKEN}),
        prepare=on_device, activations=AS_ASKED,
    )  # fmt: skip
