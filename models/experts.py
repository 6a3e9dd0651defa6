"""Layers of a mixture of experts: the router, and the experts' matrices stacked."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own spelling)
from torch import Tensor, nn

from ..common.checkpoint.block_floats import StoredMatrix
from ..platforms.interface_kernels import Problem
from .base import Placement
from .layers import Build, Layer, Linear
from .matrix_cache import Parts

_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


class Router(Linear):
    """Its logits choose experts: a rounded one would choose others, for a thousandth of the bytes
    saved."""

    rounds_on_load = False


class SigmoidRouter(Layer):
    """Sigmoid scores; a bias and groups steer the choice only (DeepSeek-V3 report, section 2.1.2).
    A float32 product: rounded logits would choose others."""

    def __init__(
        self,
        width: int,
        experts: int,
        top_k: int,
        build: Build,
        *,
        renormalise: bool = True,
        scale: float = 1.0,
        groups: int = 1,
        kept_groups: int = 1,
    ) -> None:
        super().__init__(build)
        self.weight = build.parameter(experts, width)
        self.e_score_correction_bias = build.parameter(experts, dtype=torch.float32)
        self.top_k = top_k
        self.renormalise = renormalise
        self.how = {"scale": scale, "groups": groups, "kept_groups": kept_groups}

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (T, width) -> weights and experts (T, top_k)."""
        logits = F.linear(x.float(), self.weight.float())
        form = logits, "sigmoid", self.top_k, self.renormalise
        bias = self.e_score_correction_bias
        weights, experts = self.ops.moe_route(*form, bias=bias, **self.how)
        return weights, experts

    def problems(self) -> Iterable[Problem]:
        yield self.build.problem("moe_route", experts=len(self.weight), top_k=self.top_k)


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


class Experts(nn.Module):
    """The experts of one layer, stacked: gate rows above up rows."""

    def __init__(self, experts: int, inner: int, width: int, build: Build, op: str = "moe") -> None:
        super().__init__()
        self.gate_up_proj = ExpertStack(experts, 2, inner, width, build, op)
        self.down_proj = ExpertStack(experts, 1, width, inner, build, op)


def expert_placement(name: str, inner: int) -> Placement:
    """Experts saved one by one go to their place in the stack; `inner` rows are the gate's."""
    if name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
        return Placement(f"{name}.weight")
    found = _EXPERT.fullmatch(name)
    if not found:
        return Placement(name)
    stack, expert, part = found[1], int(found[2]), found[3]
    if part == "down":
        return Placement(f"{stack}.down_proj.weight", (expert,))
    rows = slice(0, inner) if part == "gate" else slice(inner, 2 * inner)
    return Placement(f"{stack}.gate_up_proj.weight", (expert, rows))
