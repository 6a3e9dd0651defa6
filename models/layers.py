"""The layers that families share: parameters plus one call into the kernel table each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..common.checkpoint.block_floats import StoredMatrix
from ..common.errors import KernelError
from ..platforms.interface_kernels import KernelTable, Problem
from .matrix_cache import Parts


@dataclass(frozen=True)
class Build:
    """What every layer is built with."""

    ops: KernelTable
    dtype: torch.dtype  # of weights and activations
    drafts: bool = False  # with the draft head, where the family has one

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def parameter(self, *shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
        """An unfilled parameter; under `torch.device("meta")` it takes no memory."""
        return nn.Parameter(torch.empty(shape, dtype=dtype or self.dtype), requires_grad=False)

    def problem(self, op: str, **dims: int) -> Problem:
        return Problem(op, self.dtype_name, dims)

    def prepared(
        self, op: str, weight: Tensor | StoredMatrix | Iterable[StoredMatrix], problem: Problem
    ) -> Any:
        """The matrix, or stack of them, in the form that the bound kernel takes."""
        prepare = self.ops.kernels[op].prepare
        values = weight.detach() if isinstance(weight, Tensor) else weight
        return values if prepare is None else prepare(values, problem)


class Layer(nn.Module):
    """A module that calls kernels. `problems` lists each with its static sizes."""

    scheme = ""
    """How the layer's matrices are kept: "" in the weights' dtype, else a name from SCHEMES of
    models/quantization.py."""

    rounds_on_load = True
    """Whether `--quantize` may round the layer's matrices."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        self.build = build
        self.ops = build.ops

    def problems(self) -> Iterable[Problem]:
        raise NotImplementedError

    def matrix_problem(self, op: str, **dims: int) -> Problem:
        """Of an op that reads a matrix, quantised or not."""
        return Problem(op, self.build.dtype_name, dims, self.scheme)

    def prepare(self, stored: Iterable[StoredMatrix] | None = None) -> None:
        """Called when all parameters of this layer have their values. `stored` has the matrix, or a
        stack's matrices in order, when the checkpoint holds them in the layer's scheme: the
        parameter is then on meta."""

    def keepable(self) -> Parts | None:
        """The prepared matrix taken apart, where the kernel's form is worth keeping on disk."""
        return None

    def restore(self, parts: Parts) -> None:
        """In place of `prepare`, from what `keepable` gave at an earlier start."""
        raise NotImplementedError

    def _taken_apart(self, op: str, matrix: Any) -> Parts | None:
        dismantle = self.ops.kernels[op].dismantle
        if dismantle is None or isinstance(matrix, Tensor):
            return None
        return Parts(*dismantle(matrix))

    def _restored(self, op: str, parts: Parts) -> Any:
        restore = self.ops.kernels[op].restore
        if restore is None:
            raise KernelError(f"The kernel of {op!r} keeps nothing on disk.")
        return restore(parts.facts, parts.tensors)


class Linear(Layer):
    """(T, inputs) -> (T, outputs)."""

    def __init__(self, inputs: int, outputs: int, build: Build, bias: bool = False) -> None:
        super().__init__(build)
        self.weight = build.parameter(outputs, inputs)
        self.bias = build.parameter(outputs) if bias else None
        self.matrix: Any = None  # the weight as the kernel takes it

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.ops.linear(x, self.matrix, self.bias)
        return result

    def prepare(self, stored: Iterable[StoredMatrix] | None = None) -> None:
        (problem,) = self.problems()
        weight = _only(stored) or self.weight
        self.matrix = self.build.prepared("linear", weight, problem)
        if not isinstance(self.matrix, Tensor):
            del self.weight

    def keepable(self) -> Parts | None:
        return self._taken_apart("linear", self.matrix)

    def restore(self, parts: Parts) -> None:
        self.matrix = self._restored("linear", parts)
        del self.weight

    def problems(self) -> Iterable[Problem]:
        outputs, inputs = self.weight.shape
        yield self.matrix_problem("linear", k=inputs, n=outputs, bias=int(self.bias is not None))


class Embedding(Layer):
    """Token ids (T,) -> (T, width); as a tied head also (T, width) -> (T, vocabulary)."""

    def __init__(self, vocabulary: int, width: int, build: Build, tied: bool) -> None:
        super().__init__(build)
        self.weight = build.parameter(vocabulary, width)
        self.tied = tied
        self.table: Any = None  # the weight as the embedding kernel takes it
        self.head: Any = None  # the same as the linear kernel takes it, when tied

    def forward(self, token_ids: Tensor, scale: float = 1.0) -> Tensor:
        result: Tensor = self.ops.embedding(token_ids, self.table, scale)
        return result

    def project(self, x: Tensor) -> Tensor:
        result: Tensor = self.ops.linear(x, self.head, None)
        return result

    def prepare(self, stored: Iterable[StoredMatrix] | None = None) -> None:
        """One matrix serves both uses when both kernels take the same form."""
        lookup, *product = self.problems()
        weight = _only(stored) or self.weight
        self.table = self.build.prepared("embedding", weight, lookup)
        if product:
            kernels = self.ops.kernels
            same = kernels["linear"].prepare == kernels["embedding"].prepare
            self.head = self.table
            if not same:
                self.head = self.build.prepared("linear", weight, product[0])
        if not isinstance(self.table, Tensor) and not isinstance(self.head, Tensor):
            del self.weight

    def keepable(self) -> Parts | None:
        one = not self.tied or self.head is self.table
        return self._taken_apart("embedding", self.table) if one else None

    def restore(self, parts: Parts) -> None:
        self.table = self._restored("embedding", parts)
        self.head = self.table if self.tied else None
        del self.weight

    def problems(self) -> Iterable[Problem]:
        vocabulary, width = self.weight.shape
        yield self.matrix_problem("embedding", vocabulary=vocabulary, width=width)
        if self.tied:
            yield self.matrix_problem("linear", k=width, n=vocabulary, bias=0)


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
        width, size = len(self.weight), self.weight.element_size()
        for op in ("rms_norm", "add_rms_norm"):
            yield self.build.problem(op, width=width, weight_bytes=size)


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


def _only(stored: Iterable[StoredMatrix] | None) -> StoredMatrix | None:
    """Raises KernelError where a matrix was put together from several."""
    if stored is None:
        return None
    matrix, *others = stored
    if others:
        raise KernelError(f"{len(others) + 1} quantised matrices were stored for one layer.")
    return matrix
