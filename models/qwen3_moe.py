"""Qwen3 with mixtures of experts: the MLP of most layers is a router and stacked experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn

from ..common.checkpoint.fields import Fields
from .base import Placement
from .experts import Experts, Router, expert_placement
from .layers import Build, GatedMLP
from .llama import LlamaArgs
from .qwen3 import Qwen3Args, Qwen3Model


@dataclass(frozen=True, kw_only=True)
class Qwen3MoeArgs(Qwen3Args):
    experts: int
    top_k: int
    expert_inner: int
    renormalise: bool
    dense_layers: frozenset[int]

    @classmethod
    def read(cls, fields: Fields, **more: Any) -> Self:
        layers = fields.positive("num_hidden_layers")
        step = fields.positive("decoder_sparse_step", 1)
        dense = set(fields.optional("mlp_only_layers") or [])
        # This family applies a window, when it has one, to every layer.
        sliding = fields.flag("use_sliding_window", False) and fields.optional("sliding_window")
        experts = "num_experts" if fields.optional("num_experts") else "num_local_experts"
        return super(Qwen3Args, cls).read(
            fields,
            windows=(int(sliding or 0),) * layers,
            mlp_bias=False,
            experts=fields.positive(experts, 128),
            top_k=fields.positive("num_experts_per_tok", 8),
            expert_inner=fields.positive("moe_intermediate_size", 768),
            renormalise=fields.flag("norm_topk_prob", False),
            dense_layers=frozenset(
                layer for layer in range(layers) if layer in dense or (layer + 1) % step
            ),
            **more,
        )


class SparseMLP(nn.Module):
    def __init__(self, args: Qwen3MoeArgs, build: Build) -> None:
        super().__init__()
        self.ops = build.ops
        self.gate = Router(args.width, args.experts, build)
        self.experts = Experts(args.experts, args.expert_inner, args.width, build)
        self.args = args

    def forward(self, x: Tensor) -> Tensor:
        stacked = self.experts.gate_up_proj.matrix, self.experts.down_proj.matrix
        result: Tensor = self.ops.moe(
            x, self.gate(x), *stacked, self.args.top_k, self.args.renormalise
        )
        return result


class Qwen3MoeModel(Qwen3Model):
    args_class = Qwen3MoeArgs
    args: Qwen3MoeArgs

    def make_mlp(self, args: LlamaArgs, layer: int, build: Build) -> nn.Module:
        if not isinstance(args, Qwen3MoeArgs):
            raise TypeError(f"needs Qwen3MoeArgs, got {type(args).__name__}")
        if layer in args.dense_layers:
            return GatedMLP(args.width, args.inner, build)
        return SparseMLP(args, build)

    def placement(self, name: str) -> Placement | None:
        return expert_placement(name, self.args.expert_inner)
