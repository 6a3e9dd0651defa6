"""Llama 2 and 3, SmolLM2, Mistral: pre-norm blocks, grouped-query attention, rotary, gated MLP."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

from torch import Tensor, nn

from ..common.checkpoint.fields import Fields
from ..platforms.interface_attention import AttentionSpec
from ..platforms.interface_kernels import Problem
from .base import Attend, Model, Step
from .layers import Build, Embedding, GatedMLP, Layer, Linear, Norm
from .rope import Rope, rope_settings

Rotary = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class LlamaArgs:
    """What a model of this shape is built from. `windows`: one entry per layer, 0 = unlimited."""

    vocabulary: int
    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    tied: bool
    windows: tuple[int, ...]
    rope: Fields
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False

    @classmethod
    def read(cls, fields: Fields, **more: Any) -> Self:
        """From a configuration; `more` overrides or adds. Raises CheckpointError."""
        if fields.text("hidden_act", "silu") != "silu":
            raise fields.unsupported("hidden_act", "silu")
        bias = fields.flag("attention_bias", False)
        read = {
            **common_args(fields),
            "windows": _windows(fields),
            "rope": rope_settings(fields),
            "qkv_bias": bias,
            "output_bias": bias,
            "mlp_bias": fields.flag("mlp_bias", False),
        }
        return cls(**{**read, **more})


class LlamaAttention(Layer):
    def __init__(self, args: LlamaArgs, layer: int, build: Build) -> None:
        super().__init__(build)
        query, key = args.heads * args.head_dim, args.kv_heads * args.head_dim
        self.q_proj = Linear(args.width, query, build, args.qkv_bias)
        self.k_proj = Linear(args.width, key, build, args.qkv_bias)
        self.v_proj = Linear(args.width, key, build, args.qkv_bias)
        self.o_proj = Linear(query, args.width, build, args.output_bias)
        self.head_dim = args.head_dim
        self.layer = layer
        self.spec = self.attention_spec(args, layer)

    def attention_spec(self, args: LlamaArgs, layer: int) -> AttentionSpec:
        return AttentionSpec(
            heads=args.heads,
            kv_heads=args.kv_heads,
            head_dim=args.head_dim,
            scale=args.head_dim**-0.5,
            window=args.windows[layer],
            dtype=self.build.dtype_name,
        )

    def forward(self, x: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = self.rotate(q, k, rotary)
        result: Tensor = self.o_proj(attend(self.layer, q, k, v).flatten(1))
        return result

    def rotate(self, q: Tensor, k: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        q, k = self.ops.rope(q, k, *rotary)
        return q, k

    def problems(self) -> Iterable[Problem]:
        spec = self.spec
        yield self.build.problem(
            "rope", heads=spec.heads, kv_heads=spec.kv_heads, head_dim=spec.head_dim
        )


class TrunkArgs(Protocol):
    """What blocks and trunks of this shape read, of any family."""

    @property
    def vocabulary(self) -> int: ...

    @property
    def width(self) -> int: ...

    @property
    def eps(self) -> float: ...

    @property
    def tied(self) -> bool: ...


class LlamaBlock(nn.Module):
    """One layer. The residual stream and the last branch travel apart, so that each addition and
    the norm after it are one op."""

    def __init__(
        self,
        attention: nn.Module,
        mlp: nn.Module,
        args: TrunkArgs,
        build: Build,
        norm_offset: float = 0.0,
    ) -> None:
        super().__init__()
        self.self_attn = attention
        self.mlp = mlp
        self.input_layernorm = Norm(args.width, args.eps, build, norm_offset)
        self.post_attention_layernorm = Norm(args.width, args.eps, build, norm_offset)

    def forward(
        self, x: Tensor, residual: Tensor | None, rotary: Rotary, attend: Attend
    ) -> tuple[Tensor, Tensor]:
        x, residual = self.input_layernorm.add(x, residual)
        x, residual = self.post_attention_layernorm.add(self.self_attn(x, rotary, attend), residual)
        return self.mlp(x), residual


class LlamaTrunk(nn.Module):
    """The part that checkpoints call `model`."""

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        args: TrunkArgs,
        build: Build,
        norm_offset: float = 0.0,
    ) -> None:
        super().__init__()
        self.embed_tokens = Embedding(args.vocabulary, args.width, build, args.tied)
        self.layers = nn.ModuleList(blocks)
        self.norm = Norm(args.width, args.eps, build, norm_offset)


class TrunkModel(Model):
    """A trunk and the head above it, which may be the embedding's matrix."""

    model: LlamaTrunk
    lm_head: Linear | None

    def logits(self, hidden: Tensor) -> Tensor:
        head = self.model.embed_tokens.project if self.lm_head is None else self.lm_head
        return head(hidden).float()


class LlamaModel(TrunkModel):
    """Relatives override `args_class`, `attention_class` or `make_mlp`."""

    args_class: type[LlamaArgs] = LlamaArgs
    attention_class: type[LlamaAttention] = LlamaAttention

    def __init__(self, fields: Fields, build: Build) -> None:
        super().__init__()
        args = self.args_class.read(fields)
        self.args = args
        attentions = [self.attention_class(args, i, build) for i in range(args.layers)]
        self._specs = [attention.spec for attention in attentions]
        blocks = (
            LlamaBlock(attention, self.make_mlp(args, layer, build), args, build)
            for layer, attention in enumerate(attentions)
        )
        self.model = LlamaTrunk(blocks, args, build)
        self.lm_head = None if args.tied else Linear(args.width, args.vocabulary, build)
        self.rope = Rope(args.rope, args.head_dim, build)

    def make_mlp(self, args: LlamaArgs, layer: int, build: Build) -> nn.Module:
        return GatedMLP(args.width, args.inner, build, bias=args.mlp_bias)

    def attention_specs(self) -> Sequence[AttentionSpec]:
        return self._specs

    def forward(self, token_ids: Tensor, positions: Tensor, step: Step) -> Tensor:
        x, residual = self.model.embed_tokens(token_ids), None
        rotary = self.rope(positions)
        for block in self.model.layers:
            x, residual = block(x, residual, rotary, step)
        return self.model.norm.add(x, residual)[0]


def common_args(fields: Fields, inner: int | None = None) -> dict[str, Any]:
    """The sizes that every family here shares. `inner`: of the MLP, where there may be none."""
    width, heads = fields.positive("hidden_size"), fields.positive("num_attention_heads")
    kv_heads = fields.positive("num_key_value_heads", heads)
    if heads % kv_heads:
        raise fields.unsupported("num_key_value_heads", f"a divisor of the {heads} query heads")
    return {
        "vocabulary": fields.positive("vocab_size"),
        "width": width,
        "inner": fields.positive("intermediate_size", inner),
        "layers": fields.positive("num_hidden_layers"),
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": fields.positive("head_dim", width // heads),
        "eps": fields.number("rms_norm_eps"),
        "tied": fields.flag("tie_word_embeddings", False),
    }


def _windows(fields: Fields) -> tuple[int, ...]:
    """Mistral's window is on every layer; Llama has none."""
    sliding = fields.text("model_type") == "mistral" and fields.optional("sliding_window")
    window = fields.positive("sliding_window") if sliding else 0
    return (window,) * fields.positive("num_hidden_layers")
