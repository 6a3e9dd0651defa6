"""The layers that families share: parameters plus one call into the kernel table each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..platforms.interface_kernels import KernelTable, Problem


@dataclass(frozen=True)
class Build:
    """What every layer is built with."""

    ops: KernelTable
    dtype: torch.dtype  # of weights and activations

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def parameter(self, *shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
        """An unfilled parameter; under `torch.device("meta")` it takes no memory."""
        return nn.Parameter(torch.empty(shape, dtype=dtype or self.dtype), requires_grad=False)

    def problem(self, op: str, **dims: int) -> Problem:
        return Problem(op, self.dtype_name, dims)


class Layer(nn.Module):
    """A module that calls kernels. `problems` lists each with its static sizes."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        self.build = build
        self.ops = build.ops

    def problems(self) -> Iterable[Problem]:
        raise NotImplementedError


class Linear(Layer):
    """(T, inputs) -> (T, outputs)."""

    def __init__(self, inputs: int, outputs: int, build: Build, bias: bool = False) -> None:
        super().__init__(build)
        self.weight = build.parameter(outputs, inputs)
        self.bias = build.parameter(outputs) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.ops.linear(x, self.weight, self.bias)
        return result

    def problems(self) -> Iterable[Problem]:
        outputs, inputs = self.weight.shape
        yield self.build.problem("linear", k=inputs, n=outputs, bias=int(self.bias is not None))


class Embedding(Layer):
    """Token ids (T,) -> (T, width); as a tied head also (T, width) -> (T, vocabulary)."""

    def __init__(self, vocabulary: int, width: int, build: Build, tied: bool) -> None:
        super().__init__(build)
        self.weight = build.parameter(vocabulary, width)
        self.tied = tied

    def forward(self, token_ids: Tensor) -> Tensor:
        result: Tensor = self.ops.embedding(token_ids, self.weight)
        return result

    def project(self, x: Tensor) -> Tensor:
        result: Tensor = self.ops.linear(x, self.weight, None)
        return result

    def problems(self) -> Iterable[Problem]:
        vocabulary, width = self.weight.shape
        yield self.build.problem("embedding", vocabulary=vocabulary, width=width)
        if self.tied:
            yield self.build.problem("linear", k=width, n=vocabulary, bias=0)


class Norm(Layer):
    """RMS norm over the last axis.

    `offset` is added to the checkpoint's weight when it is loaded (Gemma multiplies by 1 + w). Such
    weights stay float32: near 1, sixteen bits would lose most of w.
    """

    def __init__(self, width: int, eps: float, build: Build, offset: float = 0.0) -> None:
        super().__init__(build)
        self.weight = build.parameter(width, dtype=torch.float32 if offset else None)
        self.eps = eps
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.ops.rms_norm(x, self.weight, self.eps)
        return result

    def add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual); no residual yet counts as zero."""
        if residual is None:
            return self(x), x
        normed, total = self.ops.add_rms_norm(x, residual, self.weight, self.eps)
        return normed, total

    def problems(self) -> Iterable[Problem]:
        for op in ("rms_norm", "add_rms_norm"):
            yield self.build.problem(op, width=len(self.weight))


class HeadNorm(Norm):
    """The weight of a norm that is part of a fused op (`qk_norm_rope`)."""

    def problems(self) -> Iterable[Problem]:
        return ()


class GatedMLP(Layer):
    """down(activation(gate(x)) * up(x)); `activation` is the op "silu_mul" or "gelu_tanh_mul"."""

    def __init__(
        self,
        width: int,
        inner: int,
        build: Build,
        activation: str = "silu_mul",
        bias: bool = False,
    ) -> None:
        super().__init__(build)
        self.gate_proj = Linear(width, inner, build, bias)
        self.up_proj = Linear(width, inner, build, bias)
        self.down_proj = Linear(inner, width, build, bias)
        self.activation = activation
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        inner = getattr(self.ops, self.activation)(self.gate_proj(x), self.up_proj(x))
        result: Tensor = self.down_proj(inner)
        return result

    def problems(self) -> Iterable[Problem]:
        yield self.build.problem(self.activation, width=self.inner)
