"""Layers of a mixture of experts: the router, and the experts' matrices stacked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ..common.checkpoint.block_floats import StoredMatrix
from ..platforms.interface_kernels import Problem
from .layers import Build, Layer, Linear
from .matrix_cache import Parts


class Router(Linear):
    """Its logits choose experts: a rounded one would choose others, for a thousandth of the bytes
    saved."""

    rounds_on_load = False


class ExpertStack(Layer):
    """One matrix of every expert, or two above each other (gate, up): (experts, parts * n, k). `op`
    is the one that takes it, "moe" or "moe_experts"."""

    def __init__(
        self, experts: int, parts: int, n: int, k: int, build: Build, op: str = "moe"
    ) -> None:
        super().__init__(build)
        self.op = op
        self.weight = build.parameter(experts, parts * n, k)
        self.dims = {"experts": experts, "parts": parts, "n": n, "k": k}
        self.matrix: Any = None  # the weight as the kernel takes it

    def problems(self) -> Iterable[Problem]:
        yield self.matrix_problem(self.op, **self.dims)

    def prepare(self, stored: Iterable[StoredMatrix] | None = None) -> None:
        """`stored`: the matrices (n, k), expert by expert."""
        (problem,) = self.problems()
        self.matrix = self.build.prepared(self.op, stored or self.weight, problem)
        if not isinstance(self.matrix, Tensor):
            del self.weight

    def keepable(self) -> Parts | None:
        return self._taken_apart(self.op, self.matrix)

    def restore(self, parts: Parts) -> None:
        self.matrix = self._restored(self.op, parts)
        del self.weight
