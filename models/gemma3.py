"""Gemma 3, text: scaled embeddings, norms before and after each branch, windows on most layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..common.checkpoint.fields import Fields
from ..platforms.interface_attention import AttentionSpec
from .base import Attend
from .layers import Build, GatedMLP, HeadNorm, Linear, Norm
from .llama import LlamaArgs, LlamaTrunk, Rotary, TrunkModel, common_args
from .qwen3 import Qwen3Attention
from .rope import Rope, rope_settings
from .windows import FULL, SLIDING, layer_types, window_sizes

_ONE = 1.0  # norms multiply by 1 + w


@dataclass(frozen=True, kw_only=True)
class Gemma3Args(LlamaArgs):
    """`rope` is that of full layers; sliding layers have their own."""

    types: tuple[str, ...]
    local_rope: Fields
    query_scale: float
    logit_cap: float

    @classmethod
    def read(cls, fields: Fields, **more: Any) -> Self:
        if fields.text("hidden_activation", "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
            raise fields.unsupported("hidden_activation", "gelu_pytorch_tanh")
        for name in ("use_bidirectional_attention", "attn_logit_softcapping"):
            if fields.optional(name):
                raise fields.unsupported(name, "null, as in every Gemma 3 checkpoint")
        pattern = fields.positive("sliding_window_pattern", 6)
        layers = fields.positive("num_hidden_layers")
        types = layer_types(fields, layers, lambda layer: bool((layer + 1) % pattern))
        bias = fields.flag("attention_bias", False)
        read = {
            **common_args(fields),
            "windows": window_sizes(fields, types),
            "types": types,
            "rope": _full_rope(fields),
            "local_rope": _local_rope(fields),
            "qkv_bias": bias,
            "output_bias": bias,
            "query_scale": fields.number("query_pre_attn_scalar") ** -0.5,
            "logit_cap": fields.number("final_logit_softcapping", 0.0),
        }
        return cls(**{**read, **more})


class Gemma3Attention(Qwen3Attention):
    def __init__(self, args: Gemma3Args, layer: int, build: Build) -> None:
        super().__init__(args, layer, build)
        self.q_norm = HeadNorm(args.head_dim, args.eps, build, _ONE)
        self.k_norm = HeadNorm(args.head_dim, args.eps, build, _ONE)
        self.spec = AttentionSpec(
            heads=args.heads,
            kv_heads=args.kv_heads,
            head_dim=args.head_dim,
            scale=args.query_scale,
            window=args.windows[layer],
            dtype=build.dtype_name,
        )


class Gemma3Block(nn.Module):
    """The outer norms act on a branch before it joins the residual stream."""

    def __init__(self, attention: Gemma3Attention, args: Gemma3Args, build: Build) -> None:
        super().__init__()
        self.self_attn = attention
        self.mlp = GatedMLP(args.width, args.inner, build, "gelu_tanh_mul")
        self.input_layernorm = Norm(args.width, args.eps, build, _ONE)
        self.post_attention_layernorm = Norm(args.width, args.eps, build, _ONE)
        self.pre_feedforward_layernorm = Norm(args.width, args.eps, build, _ONE)
        self.post_feedforward_layernorm = Norm(args.width, args.eps, build, _ONE)

    def forward(
        self, x: Tensor, residual: Tensor | None, rotary: Rotary, attend: Attend
    ) -> tuple[Tensor, Tensor]:
        x, residual = self.input_layernorm.add(x, residual)
        x = self.post_attention_layernorm(self.self_attn(x, rotary, attend))
        x, residual = self.pre_feedforward_layernorm.add(x, residual)
        return self.post_feedforward_layernorm(self.mlp(x)), residual


class Gemma3Model(TrunkModel):
    def __init__(self, fields: Fields, build: Build) -> None:
        super().__init__()
        args = Gemma3Args.read(fields)
        self.args = args
        attentions = [Gemma3Attention(args, i, build) for i in range(args.layers)]
        self._specs = [attention.spec for attention in attentions]
        blocks = (Gemma3Block(attention, args, build) for attention in attentions)
        self.model = LlamaTrunk(blocks, args, build, _ONE)
        self.lm_head = None if args.tied else Linear(args.width, args.vocabulary, build)
        self.ropes = nn.ModuleDict(
            {
                FULL: Rope(args.rope, args.head_dim, build),
                SLIDING: Rope(args.local_rope, args.head_dim, build),
            }
        )
        # The factor is rounded to the weights' dtype, as the model was trained.
        self.embedding_scale = torch.tensor(args.width**0.5, dtype=build.dtype, device="cpu").item()

    def attention_specs(self) -> Sequence[AttentionSpec]:
        return self._specs

    def forward(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        x, residual = self.model.embed_tokens(token_ids, self.embedding_scale), None
        rotary = {kind: rope(positions) for kind, rope in self.ropes.items()}
        for kind, block in zip(self.args.types, self.model.layers, strict=True):
            x, residual = block(x, residual, rotary[kind], attend)
        return self.model.norm.add(x, residual)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        logits = super().logits(hidden)
        cap = self.args.logit_cap
        return cap * torch.tanh(logits / cap) if cap else logits


def _full_rope(fields: Fields) -> Fields:
    settings = rope_settings(fields, FULL)
    return Fields({"rope_theta": 1_000_000.0, **settings.values}, fields.source)


def _local_rope(fields: Fields) -> Fields:
    """Sliding layers: their own base, never the full layers' scaling."""
    nested = fields.optional("rope_parameters") or {}
    if nested.get(SLIDING):
        settings = rope_settings(fields, SLIDING)
        return Fields({"rope_theta": 10_000.0, **settings.values}, fields.source)
    base = fields.number("rope_local_base_freq", 10_000.0)
    return Fields({"rope_type": "default", "rope_theta": base}, fields.source)
