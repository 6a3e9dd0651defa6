"""`linear` with weights in eight-bit floats, by torch's `_scaled_mm` (torch 2.13: self, mat2,
scale_a, scale_b, bias, scale_result, out_dtype, use_fast_accum).

Made on load: every row of a matrix (an output) is divided by a scale so that its largest value is
the format's largest, and activations are in the same way row by row in every step. Matrices of the
model that are not rounded (the head, routers) stay as they are and take torch's usual product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own spelling)
from torch import Tensor

from ..interface import DeviceFacts
from ..interface_kernels import Kernel, Problem

SCHEME = "fp8"
PRIORITY = 5
FORMATS = {"ocp": torch.float8_e4m3fn, "fnuz": torch.float8_e4m3fnuz}
MULTIPLE = 16
"""Of both sides of a matrix; `_scaled_mm` checks it."""


@dataclass(frozen=True, slots=True)
class DenseMatrix:
    weight: Tensor  # (n, k)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.weight, bias)


@dataclass(frozen=True, slots=True)
class ScaledMatrix:
    """The matrix is `weight` * `scale`."""

    weight: Tensor  # (n, k) eight-bit floats
    scale: Tensor  # (1, n) float32

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        rounded, scale = rounded_rows(x, self.weight.dtype)
        weight = self.weight.t()
        return torch._scaled_mm(rounded, weight, scale, self.scale, bias, out_dtype=x.dtype)


def rounded_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x (n, k) -> x / scale in `dtype`, scale (n, 1) float32. A row of zeros has scale 1."""
    most = torch.finfo(dtype).max
    scale = x.abs().amax(dim=-1, keepdim=True).float() / most
    scale = torch.where(scale > 0, scale, 1.0)
    return (x.float() / scale).clamp_(-most, most).to(dtype), scale


def linear(x: Tensor, matrix: DenseMatrix | ScaledMatrix, bias: Tensor | None = None) -> Tensor:
    return matrix.product(x, bias)


def scaled_linear(
    facts: DeviceFacts, supported: Callable[[DeviceFacts, Problem], str | None]
) -> Kernel:
    """The kernel for a device; `supported` adds a platform's reasons why not."""

    def requires(facts: DeviceFacts, problem: Problem) -> str | None:
        if problem.weights not in ("", SCHEME):
            return f"has no {problem.weights} weights"
        if facts.fp8 == "none":
            return f"{facts.name} has no units for eight-bit floats"
        if problem.dtype != "bfloat16":
            return f"results by row scales are bfloat16, not {problem.dtype}"
        sides = [side for side in ("k", "n") if problem.dims.get(side, 0) % MULTIPLE]
        if problem.weights and sides:
            side = sides[0]
            return f"{side} must be a multiple of {MULTIPLE}, not {problem.dims[side]}"
        return supported(facts, problem)

    def prepare(weight: Any, problem: Problem) -> DenseMatrix | ScaledMatrix:
        if problem.weights != SCHEME:
            return DenseMatrix(weight)
        rounded, scale = rounded_rows(weight, FORMATS[facts.fp8])
        return ScaledMatrix(rounded, scale.t().contiguous())

    schemes = frozenset({SCHEME})
    return Kernel(
        "linear", "scaled_mm", requires, linear, PRIORITY, schemes=schemes, prepare=prepare
    )
