"""The matrices of a layer's experts below each other as one packed matrix. Imports no Triton."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...common.checkpoint.block_floats import Fp8Blocks, Mxfp4Rows, StoredMatrix
from ...common.errors import KernelError
from ..interface_kernels import Problem
from ..torch_runtime.device import TorchDevice
from .packed_matrix import PLAIN, PackedMatrix, join_ints, pack_floats, whole_numbers

UNPACKED = -1
"""Form of a stack (experts, parts * n, k) in the dtype of the activations."""


@dataclass(frozen=True, slots=True, eq=False)
class PackedExperts:
    """`count` matrices (n, k), of every expert one or two (gate, up), in one PackedMatrix."""

    count: int
    matrix: PackedMatrix  # (count * n, k)

    @property
    def nbytes(self) -> int:
        return self.matrix.nbytes


def pack_experts(
    weights: Tensor | Iterable[StoredMatrix], problem: Problem, device: TorchDevice
) -> Tensor | PackedExperts:
    """weights (experts, parts * n, k), or its matrices (n, k) one after the other. Raises
    KernelError."""
    if isinstance(weights, Tensor) and not problem.weights:
        return weights
    if isinstance(weights, Tensor):
        weights = weights.unflatten(1, (problem.dims["parts"], -1)).flatten(0, 1)
    matrices = list(weights)
    floats = [m for m in matrices if isinstance(m, Fp8Blocks | Mxfp4Rows)]
    if floats:
        return PackedExperts(len(floats), pack_floats(floats, problem, device))
    parts = [whole_numbers(matrix, problem, device) for matrix in matrices]
    if any(part.order is not None for part in parts):
        raise KernelError(
            "Experts with columns out of order (desc_act) are not served; --quantize none "
            "converts them."
        )
    return PackedExperts(len(parts), join_ints(parts, problem))


def outputs(stack: Tensor | PackedExperts, parts: int) -> int:
    """n of a stack with so many matrices per expert."""
    if isinstance(stack, Tensor):
        return stack.shape[1] // parts
    return stack.matrix.shape[0] // stack.count


def tensors(stack: Tensor | PackedExperts) -> tuple[Tensor | None, ...]:
    """Numbers, scales and shifts."""
    if isinstance(stack, Tensor):
        return stack, None, None
    return stack.matrix.data, stack.matrix.scales, stack.matrix.shifts


def strides(stack: Tensor | PackedExperts) -> tuple[int, int, int]:
    """Of an output's numbers, and of a group's scales and shifts."""
    if isinstance(stack, Tensor):
        return stack.shape[2], 0, 0
    matrix = stack.matrix
    return matrix.data.shape[1], matrix.scales.shape[1], matrix.shape[0]


def form(stack: Tensor | PackedExperts, depth: int) -> dict[str, Any]:
    """What a kernel is specialised on, for blocks of `depth` columns at most."""
    if isinstance(stack, Tensor):
        known = {"FORM": UNPACKED, "SHIFT": PLAIN, "GROUP": 0, "SQUARES": 1, "PAIRED": False}
        return {**known, "BLOCK_K": depth}
    matrix = stack.matrix
    return {
        "FORM": matrix.form,
        "SHIFT": matrix.shift,
        "GROUP": matrix.group,
        "SQUARES": matrix.squares,
        "PAIRED": matrix.paired,
        "BLOCK_K": matrix.depth(depth),
    }
