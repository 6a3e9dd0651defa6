"""The feed-forward half of DeepSeek-V4: a router, experts with a clamped activation, and one expert
that every token takes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own spelling)
from torch import Tensor, nn

from ..platforms.interface_kernels import Problem
from .deepseek_v4_args import DeepseekV4Args
from .experts import ExpertStack
from .layers import Build, Layer, Linear


class Gate(Layer):
    """Chooses experts by their scores, in the first layers by the token's id. Its logits are a
    float32 product: rounded ones would choose others."""

    def __init__(self, args: DeepseekV4Args, by_token: bool, build: Build) -> None:
        super().__init__(build)
        self.scores = build.parameter(args.experts, args.width, dtype=torch.float32)
        self.bias = self.tid2eid = None
        if by_token:
            self.tid2eid = build.parameter(args.vocabulary, args.top_k, dtype=torch.int32)
        else:
            self.bias = build.parameter(args.experts, dtype=torch.float32)
        self.args = args

    def forward(self, x: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """x (T, width) -> weights and experts (T, top_k)."""
        args = self.args
        weights, experts = self.ops.moe_route(
            F.linear(x.float(), self.scores),
            "sqrt_softplus",
            args.top_k,
            args.renormalise,
            scale=args.route_scale,
            bias=self.bias,
            table=self.tid2eid,
            token_ids=token_ids,
        )
        return weights, experts

    def problems(self) -> Iterable[Problem]:
        yield self.build.problem("moe_route", experts=self.args.experts, top_k=self.args.top_k)


class SharedExpert(Layer):
    def __init__(self, args: DeepseekV4Args, build: Build) -> None:
        super().__init__(build)
        self.w1 = Linear(args.width, args.shared_inner, build)
        self.w3 = Linear(args.width, args.shared_inner, build)
        self.w2 = Linear(args.shared_inner, args.width, build)
        self.inner, self.limit = args.shared_inner, args.limit

    def forward(self, x: Tensor) -> Tensor:
        inner = self.ops.clamped_swiglu(self.w1(x), self.w3(x), self.limit, 1.0, 0.0)
        result: Tensor = self.w2(inner)
        return result

    def problems(self) -> Iterable[Problem]:
        yield self.build.problem("clamped_swiglu", width=self.inner)


class DeepseekV4Experts(nn.Module):
    """A layer's mixture. Every token takes the shared expert, at weight 1."""

    def __init__(self, args: DeepseekV4Args, layer: int, build: Build) -> None:
        super().__init__()
        self.ops = build.ops
        inner, width = args.expert_inner, args.width
        self.gate = Gate(args, layer < args.hash_layers, build)
        self.gate_up = ExpertStack(args.experts, 2, inner, width, build, "moe_experts")
        self.down = ExpertStack(args.experts, 1, width, inner, build, "moe_experts")
        self.shared_experts = SharedExpert(args, build)
        self.limit = args.limit

    def forward(self, x: Tensor, token_ids: Tensor) -> Tensor:
        weights, experts = self.gate(x, token_ids)
        routed: Tensor = self.ops.moe_experts(
            x, experts, weights, self.gate_up.matrix, self.down.matrix, limit=self.limit
        )
        return routed + self.shared_experts(x)
