"""Qwen3.5 with mixtures of experts: every MLP is a router, experts, and a gated shared expert."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn

from ..common.checkpoint.fields import Fields
from ..platforms.interface_kernels import Problem
from .base import Placement
from .experts import Experts, Router, expert_placement
from .layers import Build, GatedMLP, Layer
from .qwen3_5 import Qwen35Args, Qwen35Model, Unrounded


@dataclass(frozen=True, kw_only=True)
class Qwen35MoeArgs(Qwen35Args):
    experts: int
    top_k: int
    expert_inner: int
    shared_inner: int

    @classmethod
    def read(cls, fields: Fields, **more: Any) -> Self:
        return super().read(
            fields,
            inner=fields.positive("moe_intermediate_size"),
            experts=fields.positive("num_experts"),
            top_k=fields.positive("num_experts_per_tok"),
            expert_inner=fields.positive("moe_intermediate_size"),
            shared_inner=fields.positive("shared_expert_intermediate_size"),
            **more,
        )


class SharedMLP(Layer):
    """What the router's choice gives, and what every token gets, by a gate of its own."""

    def __init__(self, args: Qwen35MoeArgs, build: Build) -> None:
        super().__init__(build)
        self.gate = Router(args.width, args.experts, build)
        self.experts = Experts(args.experts, args.expert_inner, args.width, build)
        self.shared_expert = GatedMLP(args.width, args.shared_inner, build)
        self.shared_expert_gate = Unrounded(args.width, 1, build)
        self.args = args

    def forward(self, x: Tensor) -> Tensor:
        stacked = self.experts.gate_up_proj.matrix, self.experts.down_proj.matrix
        routed: Tensor = self.ops.moe(x, self.gate(x), *stacked, self.args.top_k, True)
        shared: Tensor = self.ops.sigmoid_mul(self.shared_expert_gate(x), self.shared_expert(x))
        return routed + shared

    def problems(self) -> Iterable[Problem]:
        yield self.build.problem("sigmoid_mul", width=self.args.width)


class Qwen35MoeModel(Qwen35Model):
    args_class: type[Qwen35Args] = Qwen35MoeArgs

    def make_mlp(self, args: Qwen35Args, build: Build) -> nn.Module:
        if not isinstance(args, Qwen35MoeArgs):
            raise TypeError(f"needs Qwen35MoeArgs, got {type(args).__name__}")
        return SharedMLP(args, build)

    def placement(self, name: str) -> Placement | None:
        found = super().placement(name)
        return found and expert_placement(name, self.args.expert_inner)  # type: ignore[attr-defined]
