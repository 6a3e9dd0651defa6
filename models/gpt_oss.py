"""GPT-OSS: attention with sinks, windows on every other layer, experts with biases and a clamped
activation. Checkpoints keep experts transposed, gate and up in turns, and mostly in MXFP4."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..common.checkpoint.block_floats import Mxfp4Rows, StoredMatrix
from ..common.checkpoint.fields import Fields
from ..platforms.interface_attention import AttentionSpec
from ..platforms.interface_kernels import Problem
from .base import Attend, Placement
from .experts import ExpertStack, Router
from .layers import Build, Layer
from .llama import LlamaArgs, LlamaAttention, LlamaModel, Rotary

LIMIT, SLOPE, OFFSET = 7.0, 1.702, 1.0
"""Of the experts' activation: (up + 1) * gate * sigmoid(1.702 * gate), both clamped at 7."""
_SLIDING = "sliding_attention"


@dataclass(frozen=True, kw_only=True)
class GptOssArgs(LlamaArgs):
    experts: int
    top_k: int

    @classmethod
    def read(cls, fields: Fields, **more: Any) -> Self:
        layers, window = fields.positive("num_hidden_layers"), fields.positive("sliding_window")
        if fields.number("swiglu_limit", LIMIT) != LIMIT:
            raise fields.unsupported("swiglu_limit", str(LIMIT))
        types = fields.optional("layer_types") or [
            "full_attention" if layer % 2 else _SLIDING for layer in range(layers)
        ]
        return super().read(
            fields,
            windows=tuple(window if kind == _SLIDING else 0 for kind in types),
            experts=fields.positive("num_local_experts"),
            top_k=fields.positive("num_experts_per_tok"),
            **more,
        )


class SinkAttention(LlamaAttention):
    def __init__(self, args: LlamaArgs, layer: int, build: Build) -> None:
        super().__init__(args, layer, build)
        self.sinks = build.parameter(args.heads, dtype=torch.float32)

    def attention_spec(self, args: LlamaArgs, layer: int) -> AttentionSpec:
        return replace(super().attention_spec(args, layer), sinks=True)

    def forward(self, x: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = self.rotate(q, k, rotary)
        result: Tensor = self.o_proj(attend(self.layer, q, k, v, self.sinks).flatten(1))
        return result


class TransposedStack(ExpertStack):
    """Checkpoints multiply from the left: (experts, k, n), of two matrices column by column."""

    def __init__(self, experts: int, parts: int, n: int, k: int, build: Build) -> None:
        super().__init__(experts, parts, n, k, build, "moe_experts")
        self.weight = build.parameter(experts, k, parts * n)

    def prepare(self, stored: Iterable[StoredMatrix] | None = None) -> None:
        """`stored`: the matrices of all experts below each other, rows of their parts in turns."""
        if stored is not None:
            super().prepare(self._matrices(stored))
            return
        turned = torch.empty(
            (self.dims["experts"], self.dims["parts"] * self.dims["n"], self.dims["k"]),
            dtype=self.weight.dtype,
            device=self.weight.device,
        )
        parts = self.dims["parts"]
        for expert, matrix in zip(turned.unbind(0), self.weight.detach().unbind(0), strict=True):
            for part, rows in enumerate(expert.chunk(parts)):
                rows.copy_(matrix[:, part::parts].T)
        self.weight = nn.Parameter(turned, requires_grad=False)
        super().prepare()

    def _matrices(self, stored: Iterable[StoredMatrix]) -> Iterator[StoredMatrix]:
        (whole,) = stored
        if not isinstance(whole, Mxfp4Rows):
            raise TypeError(f"a transposed stack is stored as Mxfp4Rows, not {type(whole)}")
        parts = self.dims["parts"]
        rows = parts * self.dims["n"]
        for expert in range(self.dims["experts"]):
            for part in range(parts):
                yield whole.rows(slice(expert * rows + part, (expert + 1) * rows, parts))


class BiasedExperts(Layer):
    """The names of the checkpoint: a matrix and its bias stand side by side."""

    def __init__(self, args: GptOssArgs, build: Build) -> None:
        super().__init__(build)
        experts, inner, width = args.experts, args.inner, args.width
        self.gate_up_proj = TransposedStack(experts, 2, inner, width, build)
        self.down_proj = TransposedStack(experts, 1, width, inner, build)
        self.gate_up_proj_bias = build.parameter(experts, 2 * inner)
        self.down_proj_bias = build.parameter(experts, width)
        self.choice = {"experts": experts, "top_k": args.top_k}

    def prepare(self, stored: Any = None) -> None:
        turns = self.gate_up_proj_bias.detach()
        ordered = torch.cat((turns[:, 0::2], turns[:, 1::2]), dim=1)
        self.gate_up_proj_bias = nn.Parameter(ordered, requires_grad=False)

    def problems(self) -> Iterable[Problem]:
        yield self.build.problem("moe_route", **self.choice)


class GptOssExperts(nn.Module):
    def __init__(self, args: GptOssArgs, build: Build) -> None:
        super().__init__()
        self.ops = build.ops
        self.router = Router(args.width, args.experts, build, bias=True)
        self.experts = BiasedExperts(args, build)
        self.top_k = args.top_k

    def forward(self, x: Tensor) -> Tensor:
        # Softmax over the chosen is softmax over all, renormalised.
        logits = self.router(x).float()
        weights, chosen = self.ops.moe_route(logits, "softmax", self.top_k, True)
        experts = self.experts
        result: Tensor = self.ops.moe_experts(
            x,
            chosen,
            weights,
            experts.gate_up_proj.matrix,
            experts.down_proj.matrix,
            experts.gate_up_proj_bias,
            experts.down_proj_bias,
            limit=LIMIT,
            slope=SLOPE,
            offset=OFFSET,
        )
        return result


class GptOssModel(LlamaModel):
    args_class: type[LlamaArgs] = GptOssArgs
    attention_class: type[LlamaAttention] = SinkAttention

    def make_mlp(self, args: LlamaArgs, layer: int, build: Build) -> nn.Module:
        if not isinstance(args, GptOssArgs):
            raise TypeError(f"needs GptOssArgs, got {type(args).__name__}")
        return GptOssExperts(args, build)

    def placement(self, name: str) -> Placement | None:
        if name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            return Placement(f"{name}.weight")
        return super().placement(name)
