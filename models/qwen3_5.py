"""Qwen3.5 (dense): three layers of the gated delta rule for one of gated attention; where the
checkpoint has a vision tower, rows of images among the embeddings.

Norms are zero-centred (they multiply by 1 + w) but for the one inside the recurrent mixer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..common.checkpoint.fields import Fields
from ..platforms.interface import ImageInput
from ..platforms.interface_attention import AttentionSpec
from ..platforms.interface_kernels import Problem
from ..platforms.interface_kv import CacheNeed, KVKind, StateArray
from .base import Attend, Placement, Step, attention_need
from .layers import Build, GatedMLP, HeadNorm, Layer, Linear, Norm
from .llama import LlamaTrunk, Rotary, TrunkModel, common_args
from .qwen3_5_vision import Qwen35Vision, vision_fields
from .rope import MultiAxisRope, rope_settings
from .vision import ImageRows

LINEAR, FULL = "linear_attention", "full_attention"
_ONE = 1.0


@dataclass(frozen=True, kw_only=True)
class Qwen35Args:
    vocabulary: int
    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    tied: bool
    rope: Fields
    types: tuple[str, ...]
    key_heads: int  # of the recurrent mixer
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int

    @classmethod
    def read(cls, fields: Fields, **more: Any) -> Self:
        """From a configuration; `more` overrides or adds. Raises CheckpointError."""
        if fields.text("hidden_act", "silu") != "silu":
            raise fields.unsupported("hidden_act", "silu")
        if not fields.flag("attn_output_gate", True):
            raise fields.unsupported("attn_output_gate", "true")
        if fields.flag("attention_bias", False):
            raise fields.unsupported("attention_bias", "false")
        key_heads = fields.positive("linear_num_key_heads")
        value_heads = fields.positive("linear_num_value_heads")
        if value_heads % key_heads:
            raise fields.unsupported("linear_num_value_heads", f"a multiple of {key_heads}")
        return cls(
            **common_args(fields, more.pop("inner", None)),
            rope=rope_settings(fields),
            types=_layer_types(fields),
            key_heads=key_heads,
            value_heads=value_heads,
            key_dim=fields.positive("linear_key_head_dim"),
            value_dim=fields.positive("linear_value_head_dim"),
            taps=fields.positive("linear_conv_kernel_dim", 4),
            **more,
        )


def _layer_types(fields: Fields) -> tuple[str, ...]:
    layers = fields.positive("num_hidden_layers")
    types = fields.optional("layer_types")
    if types is None:
        interval = fields.positive("full_attention_interval", 4)
        types = [LINEAR if (layer + 1) % interval else FULL for layer in range(layers)]
    if len(types) != layers or not set(types) <= {LINEAR, FULL}:
        raise fields.unsupported("layer_types", f"{layers} of {LINEAR}, {FULL}")
    return tuple(types)


def _draft_layers(fields: Fields) -> int:
    layers = fields.integer("mtp_num_hidden_layers", 1)
    if layers not in (0, 1):
        raise fields.unsupported("mtp_num_hidden_layers", "0 or 1")
    if fields.flag("mtp_use_dedicated_embeddings", False):
        raise fields.unsupported("mtp_use_dedicated_embeddings", "false")
    return layers


class Unrounded(Linear):
    """A few rows that steer: rounding them would save nothing and cost digits."""

    rounds_on_load = False


class GatedDeltaNet(Layer):
    """A short convolution, the gated delta rule, and a gated norm (spec of the op: `gated_delta`).

    Keys, values and queries of all heads come from one product; the convolution runs over them.
    """

    def __init__(self, args: Qwen35Args, site: int, build: Build) -> None:
        super().__init__(build)
        keys, values = args.key_heads * args.key_dim, args.value_heads * args.value_dim
        self.in_proj_qkv = Linear(args.width, 2 * keys + values, build)
        self.in_proj_z = Linear(args.width, values, build)
        self.in_proj_b = Unrounded(args.width, args.value_heads, build)
        self.in_proj_a = Unrounded(args.width, args.value_heads, build)
        self.conv1d = Taps(2 * keys + values, args.taps, build)
        self.A_log = build.parameter(args.value_heads, dtype=torch.float32)
        self.dt_bias = build.parameter(args.value_heads, dtype=torch.float32)
        self.norm = HeadNorm(args.value_dim, args.eps, build)
        self.out_proj = Linear(values, args.width, build)
        self.split = (keys, keys, values)
        self.args = args
        self.site = site

    def need(self) -> CacheNeed:
        args, channels = self.args, sum(self.split)
        inputs = StateArray((args.taps - 1, channels), self.build.dtype_name)
        state = StateArray((args.value_heads, args.key_dim, args.value_dim), "float32")
        return CacheNeed(KVKind.RECURRENT, 0, 0, states=(inputs, state))

    def forward(self, x: Tensor, rotary: Rotary, step: Step) -> Tensor:
        args, (arrays, slots) = self.args, step.state(self.site)
        rows = slots, step.query_start, step.context_lens
        mixed, _ = self.ops.conv1d_update(
            self.in_proj_qkv(x), self.conv1d.weight.squeeze(1), None, arrays[0], *rows, True
        )
        q, k, v = mixed.split(self.split, dim=-1)
        q, k = (part.unflatten(-1, (args.key_heads, args.key_dim)) for part in (q, k))
        v = v.unflatten(-1, (args.value_heads, args.value_dim))
        gates = self.in_proj_a(x), self.in_proj_b(x), self.A_log, self.dt_bias
        o, _ = self.ops.gated_delta(q, k, v, *gates, arrays[1], *rows)
        normed = self.ops.rms_norm(o.flatten(0, 1), self.norm.weight, args.eps)
        gated = self.ops.silu_mul(self.in_proj_z(x), normed.view(len(x), -1))
        result: Tensor = self.out_proj(gated)
        return result

    def problems(self) -> Iterable[Problem]:
        args, build = self.args, self.build
        yield build.problem("conv1d_update", channels=sum(self.split), taps=args.taps)
        heads = {"key_heads": args.key_heads, "value_heads": args.value_heads}
        dims = {"key_dim": args.key_dim, "value_dim": args.value_dim}
        yield build.problem("gated_delta", **heads, **dims)
        size = self.norm.weight.element_size()
        yield build.problem("rms_norm", width=args.value_dim, weight_bytes=size)
        yield build.problem("silu_mul", width=self.split[2])


class GatedAttention(Layer):
    """Grouped attention whose queries come with a gate per channel, head by head."""

    def __init__(self, args: Qwen35Args, site: int, build: Build) -> None:
        super().__init__(build)
        query, key = args.heads * args.head_dim, args.kv_heads * args.head_dim
        self.q_proj = Linear(args.width, 2 * query, build)
        self.k_proj = Linear(args.width, key, build)
        self.v_proj = Linear(args.width, key, build)
        self.o_proj = Linear(query, args.width, build)
        self.q_norm = HeadNorm(args.head_dim, args.eps, build, _ONE)
        self.k_norm = HeadNorm(args.head_dim, args.eps, build, _ONE)
        self.site = site
        self.spec = AttentionSpec(
            heads=args.heads,
            kv_heads=args.kv_heads,
            head_dim=args.head_dim,
            scale=args.head_dim**-0.5,
            dtype=build.dtype_name,
        )

    def need(self) -> CacheNeed:
        return attention_need(self.spec)

    def forward(self, x: Tensor, rotary: Rotary, step: Attend) -> Tensor:
        spec = self.spec
        q, gate = self.q_proj(x).view(len(x), spec.heads, 2, spec.head_dim).unbind(2)
        k, v = (p(x).unflatten(-1, (-1, spec.head_dim)) for p in (self.k_proj, self.v_proj))
        weights = self.q_norm.weight, self.k_norm.weight
        q, k = self.ops.qk_norm_rope(q.contiguous(), k, *weights, self.q_norm.eps, *rotary)
        attended = step(self.site, q, k, v).flatten(1)
        result: Tensor = self.o_proj(self.ops.sigmoid_mul(gate.flatten(1), attended))
        return result

    def problems(self) -> Iterable[Problem]:
        spec = self.spec
        heads = {"heads": spec.heads, "kv_heads": spec.kv_heads}
        yield self.build.problem("qk_norm_rope", **heads, head_dim=spec.head_dim)
        yield self.build.problem("sigmoid_mul", width=spec.heads * spec.head_dim)


class Taps(nn.Module):
    """The weights of the convolution, as checkpoints shape them: (channels, 1, taps)."""

    def __init__(self, channels: int, taps: int, build: Build) -> None:
        super().__init__()
        self.weight = build.parameter(channels, 1, taps)


class Qwen35Block(nn.Module):
    def __init__(
        self, kind: str, mixer: GatedDeltaNet | GatedAttention, mlp: nn.Module, args: Qwen35Args,
        build: Build,
    ) -> None:  # fmt: skip
        super().__init__()
        self.mixer_name = "linear_attn" if kind == LINEAR else "self_attn"
        self.add_module(self.mixer_name, mixer)
        self.mlp = mlp
        self.input_layernorm = Norm(args.width, args.eps, build, _ONE)
        self.post_attention_layernorm = Norm(args.width, args.eps, build, _ONE)

    def forward(
        self, x: Tensor, residual: Tensor | None, rotary: Rotary, step: Step
    ) -> tuple[Tensor, Tensor]:
        x, residual = self.input_layernorm.add(x, residual)
        mixed = self.get_submodule(self.mixer_name)(x, rotary, step)
        x, residual = self.post_attention_layernorm.add(mixed, residual)
        return self.mlp(x), residual


class Qwen35Draft(nn.Module):
    """The head that predicts one token more: the next token's embedding and the model's hidden
    state, both normed, through one product and one layer. It feeds on its own output alike."""

    def __init__(
        self, attention: GatedAttention, mlp: nn.Module, args: Qwen35Args, build: Build
    ) -> None:
        super().__init__()
        self.pre_fc_norm_embedding = Norm(args.width, args.eps, build, _ONE)
        self.pre_fc_norm_hidden = Norm(args.width, args.eps, build, _ONE)
        self.fc = Linear(2 * args.width, args.width, build)
        self.layers = nn.ModuleList([Qwen35Block(FULL, attention, mlp, args, build)])
        self.norm = Norm(args.width, args.eps, build, _ONE)

    def forward(self, embedded: Tensor, hidden: Tensor, rotary: Rotary, step: Step) -> Tensor:
        both = self.pre_fc_norm_embedding(embedded), self.pre_fc_norm_hidden(hidden)
        x, residual = self.layers[0](self.fc(torch.cat(both, dim=-1)), None, rotary, step)
        return self.norm.add(x, residual)[0]


class Qwen35Model(TrunkModel):
    args_class: type[Qwen35Args] = Qwen35Args

    def __init__(self, fields: Fields, build: Build) -> None:
        super().__init__()
        args = self.args_class.read(fields)
        self.args = args
        self._mixers = [
            (GatedDeltaNet if kind == LINEAR else GatedAttention)(args, site, build)
            for site, kind in enumerate(args.types)
        ]
        blocks = (
            Qwen35Block(kind, mixer, self.make_mlp(args, build), args, build)
            for kind, mixer in zip(args.types, self._mixers, strict=True)
        )
        self.model = LlamaTrunk(blocks, args, build, _ONE)
        self.lm_head = None if args.tied else Linear(args.width, args.vocabulary, build)
        self.rope = MultiAxisRope(args.rope, args.head_dim, build)
        seen = vision_fields(fields)
        self.vision = None if seen is None else Qwen35Vision(seen, build)
        self.image_token = 0 if seen is None else fields.positive("image_token_id")
        if build.drafts and _draft_layers(fields):
            attention = GatedAttention(args, len(self._mixers), build)
            self._mixers.append(attention)
            self.mtp = Qwen35Draft(attention, self.make_mlp(args, build), args, build)

    def make_mlp(self, args: Qwen35Args, build: Build) -> nn.Module:
        return GatedMLP(args.width, args.inner, build)

    def cache_needs(self) -> Sequence[CacheNeed]:
        return [mixer.need() for mixer in self._mixers]

    def attention_specs(self) -> Sequence[AttentionSpec | None]:
        return [m.spec if isinstance(m, GatedAttention) else None for m in self._mixers]

    def images(self) -> ImageInput | None:
        if self.vision is None:
            return None
        return ImageInput(self.image_token, self.vision.merge, self.vision.patch_values)

    def forward(
        self, token_ids: Tensor, positions: Tensor, step: Step, images: ImageRows | None = None
    ) -> Tensor:
        x, residual = self.model.embed_tokens(token_ids), None
        if images is not None:
            x = images.placed(x)
        rotary = self.rope(positions)
        for block in self.model.layers:
            x, residual = block(x, residual, rotary, step)
        return self.model.norm.add(x, residual)[0]

    def draft(self, hidden: Tensor, token_ids: Tensor, positions: Tensor, step: Step) -> Tensor:
        made: Tensor = self.mtp(
            self.model.embed_tokens(token_ids), hidden, self.rope(positions), step
        )
        return made

    def draft_logits(self, hidden: Tensor) -> Tensor:
        return self.logits(hidden)

    def placement(self, name: str) -> Placement | None:
        """The draft head is known, and loaded where something drafts with it."""
        if name.startswith("mtp.") and not self.drafts:
            return None
        return super().placement(name)
