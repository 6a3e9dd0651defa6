"""DeepSeek-V3: latent attention (MLA), dense layers first, then mixtures of experts.

Attention runs in its absorbed form always (DeepSeek-V2 report, section 2.1.3): queries are
multiplied into the latent space, in which one vector per token is key and value of all heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..common.checkpoint.fields import Fields
from ..platforms.interface_attention import AttentionSpec
from ..platforms.interface_kernels import Problem
from ..platforms.interface_kv import CacheNeed, KVKind
from .base import Placement, Step, layer_of
from .experts import Experts, SigmoidRouter, expert_placement
from .layers import Build, GatedMLP, HeadNorm, Layer, Linear, Norm
from .llama import LlamaBlock, LlamaTrunk, Rotary, TrunkModel, common_args
from .rope import Rope, rope_settings

LATENT_EPS = 1e-6
"""Of the two norms inside attention, whatever rms_norm_eps is."""


@dataclass(frozen=True, kw_only=True)
class DeepseekV3Args:
    vocabulary: int
    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int  # of keys, both parts
    eps: float
    tied: bool
    rope: Fields
    query_rank: int  # 0 = one product
    rank: int  # of the latent
    plain_dim: int  # channels of a key without position
    rope_dim: int
    value_dim: int
    scale: float
    dense_layers: int
    experts: int
    top_k: int
    expert_inner: int
    shared: int
    groups: int
    kept_groups: int
    renormalise: bool
    route_scale: float

    @classmethod
    def read(cls, fields: Fields) -> Self:
        """Raises CheckpointError."""
        if fields.text("hidden_act", "silu") != "silu":
            raise fields.unsupported("hidden_act", "silu")
        if fields.text("scoring_func", "sigmoid") != "sigmoid":
            raise fields.unsupported("scoring_func", "sigmoid")
        if fields.flag("attention_bias", False):
            raise fields.unsupported("attention_bias", "false")
        plain, turned = fields.positive("qk_nope_head_dim"), fields.positive("qk_rope_head_dim")
        rope = rope_settings(fields)
        return cls(
            **{**common_args(fields), "head_dim": plain + turned},
            rope=rope,
            query_rank=int(fields.optional("q_lora_rank") or 0),
            rank=fields.positive("kv_lora_rank"),
            plain_dim=plain,
            rope_dim=turned,
            value_dim=fields.positive("v_head_dim"),
            scale=(plain + turned) ** -0.5 * _sharpening(rope) ** 2,
            dense_layers=fields.integer("first_k_dense_replace", 0),
            experts=fields.positive("n_routed_experts"),
            top_k=fields.positive("num_experts_per_tok"),
            expert_inner=fields.positive("moe_intermediate_size"),
            shared=fields.positive("n_shared_experts", 1),
            groups=fields.positive("n_group", 1),
            kept_groups=fields.positive("topk_group", 1),
            renormalise=fields.flag("norm_topk_prob", True),
            route_scale=fields.number("routed_scaling_factor", 1.0),
        )


def _sharpening(rope: Fields) -> float:
    """YaRN's factor for the logits of long contexts; squared, as it is queries' and keys'."""
    weight = rope.optional("mscale_all_dim")
    if rope.text("rope_type") == "default" or not weight:
        return 1.0
    factor = rope.number("factor")
    return 1.0 if factor <= 1 else 0.1 * float(weight) * math.log(factor) + 1.0


class Absorbed(Layer):
    """kv_b_proj, which would expand a latent to every head's key and value: its two halves go to
    the query and to the result instead."""

    def __init__(self, args: DeepseekV3Args, build: Build) -> None:
        super().__init__(build)
        self.weight = build.parameter(args.heads * (args.plain_dim + args.value_dim), args.rank)
        self.args = args
        self.into: Any = None  # (heads, rank, plain_dim)
        self.out: Any = None  # (heads, value_dim, rank)

    def prepare(self, stored: Any = None) -> None:
        args = self.args
        by_head = self.weight.detach().view(args.heads, -1, args.rank)
        keys, values = by_head.split((args.plain_dim, args.value_dim), dim=1)
        self.into, self.out = keys.mT.contiguous(), values.contiguous()
        del self.weight

    def problems(self) -> Iterable[Problem]:
        args = self.args
        sizes = {"groups": args.heads, "n": args.rank, "k": args.plain_dim}
        yield self.build.problem("grouped_linear", **sizes)
        yield self.build.problem("grouped_linear", **sizes | {"n": args.value_dim, "k": args.rank})


class LatentAttention(Layer):
    def __init__(self, args: DeepseekV3Args, site: int, build: Build) -> None:
        super().__init__(build)
        queries = args.heads * args.head_dim
        if args.query_rank:
            self.q_a_proj = Linear(args.width, args.query_rank, build)
            self.q_a_layernorm = HeadNorm(args.query_rank, LATENT_EPS, build)
            self.q_b_proj = Linear(args.query_rank, queries, build)
        else:
            self.q_proj = Linear(args.width, queries, build)
        self.kv_a_proj_with_mqa = Linear(args.width, args.rank + args.rope_dim, build)
        self.kv_a_layernorm = HeadNorm(args.rank, LATENT_EPS, build)
        self.kv_b_proj = Absorbed(args, build)
        self.o_proj = Linear(args.heads * args.value_dim, args.width, build)
        self.args, self.site = args, site

    def need(self) -> CacheNeed:
        dim = self.args.rank + self.args.rope_dim
        return CacheNeed(KVKind.LATENT, 1, dim, dtype=self.build.dtype_name)

    def forward(self, x: Tensor, rotary: Rotary, step: Step) -> Tensor:
        args, ops = self.args, self.ops
        q = self._queries(x).view(len(x), args.heads, args.head_dim)
        plain, turned = q.split((args.plain_dim, args.rope_dim), dim=-1)
        latent, key = self.kv_a_proj_with_mqa(x).split((args.rank, args.rope_dim), dim=-1)
        latent = ops.rms_norm(latent.contiguous(), self.kv_a_layernorm.weight, LATENT_EPS)
        key = ops.interleaved_rope(key.unsqueeze(1), *rotary).squeeze(1)
        inside = ops.grouped_linear(plain.flatten(1), self.kv_b_proj.into)
        q = torch.cat(
            (inside.view(len(x), args.heads, -1), ops.interleaved_rope(turned, *rotary)), dim=-1
        )
        pages = step.pages(self.site)
        made, _ = ops.latent_attention(
            q,
            torch.cat((latent, key), dim=-1),
            pages.cache,
            pages.table,
            step.query_start,
            step.context_lens,
            pages.page_size,
            args.rank,
            args.scale,
        )
        result: Tensor = self.o_proj(ops.grouped_linear(made.flatten(1), self.kv_b_proj.out))
        return result

    def _queries(self, x: Tensor) -> Tensor:
        if not self.args.query_rank:
            whole: Tensor = self.q_proj(x)
            return whole
        low = self.ops.rms_norm(self.q_a_proj(x), self.q_a_layernorm.weight, LATENT_EPS)
        result: Tensor = self.q_b_proj(low)
        return result

    def problems(self) -> Iterable[Problem]:
        args, build = self.args, self.build
        for width in {args.rank, args.query_rank} - {0}:
            size = self.kv_a_layernorm.weight.element_size()
            yield build.problem("rms_norm", width=width, weight_bytes=size)
        for heads in (1, args.heads):
            sizes = {"heads": heads, "head_dim": args.rope_dim, "rotary": args.rope_dim}
            yield build.problem("interleaved_rope", **sizes)
        sizes = {"heads": args.heads, "dim": args.rank + args.rope_dim, "value_dim": args.rank}
        yield build.problem("latent_attention", **sizes)


class DeepseekV3Experts(nn.Module):
    """A layer's mixture. Every token takes the shared experts, as one MLP, at weight 1."""

    def __init__(self, args: DeepseekV3Args, build: Build) -> None:
        super().__init__()
        self.ops = build.ops
        self.gate = SigmoidRouter(
            args.width,
            args.experts,
            args.top_k,
            build,
            renormalise=args.renormalise,
            scale=args.route_scale,
            groups=args.groups,
            kept_groups=args.kept_groups,
        )
        sizes = args.experts, args.expert_inner, args.width
        self.experts = Experts(*sizes, build, "moe_experts")
        self.shared_experts = GatedMLP(args.width, args.shared * args.expert_inner, build)

    def forward(self, x: Tensor) -> Tensor:
        weights, experts = self.gate(x)
        stacked = self.experts.gate_up_proj.matrix, self.experts.down_proj.matrix
        routed: Tensor = self.ops.moe_experts(x, experts, weights, *stacked)
        return routed + self.shared_experts(x)


class SharedHead(nn.Module):
    """What the head has of its own before the model's last product."""

    def __init__(self, args: DeepseekV3Args, build: Build) -> None:
        super().__init__()
        self.norm = Norm(args.width, args.eps, build)


class DeepseekV3Draft(LlamaBlock):
    """The head that predicts one token more (DeepSeek-V3 report, section 2.2): a layer over one
    product of the next token's embedding and the model's hidden state, both normed. What it feeds
    back to itself is its output before its own norm."""

    def __init__(
        self, attention: LatentAttention, mlp: nn.Module, args: DeepseekV3Args, build: Build
    ) -> None:
        super().__init__(attention, mlp, args, build)
        self.enorm = Norm(args.width, args.eps, build)
        self.hnorm = Norm(args.width, args.eps, build)
        self.eh_proj = Linear(2 * args.width, args.width, build)
        self.shared_head = SharedHead(args, build)

    def draft(self, embedded: Tensor, hidden: Tensor, rotary: Rotary, step: Step) -> Tensor:
        x = self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(hidden)), dim=-1))
        x, residual = self(x, None, rotary, step)
        result: Tensor = x + residual
        return result


class DeepseekV3Model(TrunkModel):
    def __init__(self, fields: Fields, build: Build) -> None:
        super().__init__()
        self.args = args = DeepseekV3Args.read(fields)
        attentions = [LatentAttention(args, site, build) for site in range(args.layers)]
        self._needs = [attention.need() for attention in attentions]
        blocks = (
            LlamaBlock(attention, self._mlp(layer, build), args, build)
            for layer, attention in enumerate(attentions)
        )
        self.model = LlamaTrunk(blocks, args, build)
        self.lm_head = None if args.tied else Linear(args.width, args.vocabulary, build)
        self.rope = Rope(args.rope, args.rope_dim, build)
        if build.drafts and fields.integer("num_nextn_predict_layers", 0):
            attention = LatentAttention(args, args.layers, build)
            self._needs.append(attention.need())
            self.mtp = DeepseekV3Draft(attention, self._mlp(args.layers, build), args, build)

    def _mlp(self, layer: int, build: Build) -> nn.Module:
        if layer < self.args.dense_layers:
            return GatedMLP(self.args.width, self.args.inner, build)
        return DeepseekV3Experts(self.args, build)

    def cache_needs(self) -> Sequence[CacheNeed]:
        return self._needs

    def attention_specs(self) -> Sequence[AttentionSpec | None]:
        return [None] * len(self._needs)

    def forward(self, token_ids: Tensor, positions: Tensor, step: Step) -> Tensor:
        x, residual = self.model.embed_tokens(token_ids), None
        rotary = self.rope(positions)
        for block in self.model.layers:
            x, residual = block(x, residual, rotary, step)
        return self.model.norm.add(x, residual)[0]

    def draft(self, hidden: Tensor, token_ids: Tensor, positions: Tensor, step: Step) -> Tensor:
        embedded = self.model.embed_tokens(token_ids)
        return self.mtp.draft(embedded, hidden, self.rope(positions), step)

    def draft_logits(self, hidden: Tensor) -> Tensor:
        return self.logits(self.mtp.shared_head.norm(hidden))

    def placement(self, name: str) -> Placement | None:
        """The layers behind the last are draft heads. The first of them is loaded where something
        drafts with it, but for its copies of the embedding and the head."""
        behind = layer_of(name) - self.args.layers
        if behind < 0:
            return expert_placement(name, self.args.expert_inner)
        leaf = name.removeprefix(f"model.layers.{self.args.layers}.")
        if behind or not self.drafts or leaf in ("embed_tokens.weight", "shared_head.head.weight"):
            return None
        return expert_placement(f"mtp.{leaf}", self.args.expert_inner)
