"""Step-3.5-Flash, which is the text of Step-3.7-Flash: layers that see a window have more heads
than those that see all, every head's result passes a gate, and late layers clamp their experts.

Norms are zero-centred (they multiply by 1 + w).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn

from ..common.checkpoint.fields import Fields
from ..common.images.patches import Grid
from ..platforms.interface import ImageInput
from ..platforms.interface_attention import AttentionSpec
from ..platforms.interface_kernels import Problem
from .base import Attend, Placement, Step, layer_of
from .experts import Experts, SigmoidRouter
from .layers import Build, GatedMLP, HeadNorm, Layer, Linear
from .llama import LlamaBlock, LlamaTrunk, Rotary, TrunkModel, common_args
from .rope import Rope, rope_settings
from .step3p7_vision import MERGE, Step3p7Vision, tower_name, vision_args
from .vision import ImageRows
from .windows import FULL, SLIDING, layer_types, window_sizes

_ONE = 1.0
_ALIASES = {
    "num_attention_groups": "num_key_value_heads",
    "moe_num_experts": "n_routed_experts",
    "moe_top_k": "num_experts_per_tok",
    "share_expert_dims": "share_expert_dim",
}
_FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "moe_router_activation": "sigmoid",
    "norm_expert_weight": True,
    "use_head_wise_attn_gate": True,
    "zero_centered": True,
    "sink": False,
}
"""Fields that may be left out; with another value the model would be another."""


@dataclass(frozen=True, kw_only=True)
class Step3p7Args:
    """Tuples have an entry per layer. A limit of 0 clamps nothing."""

    vocabulary: int
    width: int
    inner: int
    layers: int
    heads: int  # of layers that see all
    sliding_heads: int
    kv_heads: int
    head_dim: int
    eps: float
    tied: bool
    types: tuple[str, ...]
    windows: tuple[int, ...]
    ropes: Mapping[str, Fields]  # by layer type
    scale: float
    sparse: tuple[bool, ...]
    experts: int
    top_k: int
    expert_inner: int
    shared_inner: int
    route_scale: float
    limits: tuple[float, ...]  # of routed experts
    shared_limits: tuple[float, ...]  # of the shared expert, and of dense layers

    @classmethod
    def read(cls, given: Fields) -> Self:
        """Raises CheckpointError."""
        named = {_ALIASES[name]: given.values[name] for name in _ALIASES if name in given.values}
        fields = Fields({**given.values, **named}, given.source)
        for name, value in _FIXED.items():
            if fields.optional(name) not in (None, value):
                raise fields.unsupported(name, str(value).lower())
        common = common_args(fields)
        layers = common["layers"]
        types = layer_types(fields, layers, lambda layer: False)
        return cls(
            **common,
            sliding_heads=_sliding_heads(fields, common),
            types=types,
            windows=window_sizes(fields, types),
            ropes={kind: _rope(fields, types, kind) for kind in sorted(set(types))},
            scale=fields.number("query_pre_attn_scalar", common["head_dim"]) ** -0.5,
            sparse=_sparse(fields, layers),
            experts=fields.positive("n_routed_experts"),
            top_k=fields.positive("num_experts_per_tok"),
            expert_inner=fields.positive("moe_intermediate_size"),
            shared_inner=fields.positive("share_expert_dim"),
            route_scale=fields.number("moe_router_scaling_factor", 1.0),
            limits=_limits(fields, "swiglu_limits", layers),
            shared_limits=_limits(fields, "swiglu_limits_shared", layers),
        )


def _per_layer(fields: Fields, name: str, layers: int) -> list[Any] | None:
    """A list's entries for the layers that are served; those of layers that predict a second token
    stand behind them."""
    values = fields.optional(name)
    if values is None:
        return None
    if not isinstance(values, list) or len(values) < layers:
        raise fields.unsupported(name, f"a list with an entry for each of {layers} layers")
    return values[:layers]


def _limits(fields: Fields, name: str, layers: int) -> tuple[float, ...]:
    values = _per_layer(fields, name, layers) or [0.0] * layers
    return tuple(float(value or 0.0) for value in values)


def _sliding_heads(fields: Fields, common: Mapping[str, Any]) -> int:
    other = fields.optional("attention_other_setting") or {}
    settings = Fields(other, fields.source)
    for name, own in (("num_attention_groups", "kv_heads"), ("head_dim", "head_dim")):
        if settings.optional(name) not in (None, common[own]):
            raise settings.unsupported(name, f"{common[own]}, as on the other layers")
    default = settings.positive("num_attention_heads", common["heads"])
    heads = fields.positive("num_sliding_attention_heads", default)
    if heads % common["kv_heads"]:
        what = f"a multiple of the {common['kv_heads']} key/value heads"
        raise fields.unsupported("num_sliding_attention_heads", what)
    return heads


def _sparse(fields: Fields, layers: int) -> tuple[bool, ...]:
    kinds = _per_layer(fields, "mlp_layer_types", layers)
    if kinds is not None:
        if not set(kinds) <= {"dense", "sparse"}:
            raise fields.unsupported("mlp_layer_types", "dense or sparse, layer by layer")
        return tuple(kind == "sparse" for kind in kinds)
    listed = fields.optional("moe_layers_enum")
    if listed is None:
        return tuple(layer >= 3 for layer in range(layers))
    items = listed.split(",") if isinstance(listed, str) else listed
    try:
        chosen = {int(item) for item in items if str(item).strip()}
    except (TypeError, ValueError):
        raise fields.unsupported("moe_layers_enum", "numbers of layers, like 3,4,5") from None
    return tuple(layer in chosen for layer in range(layers))


def _rope(fields: Fields, types: tuple[str, ...], kind: str) -> Fields:
    """Of the layers of one type, from either form: nested by type, or lists by layer with a scaling
    that is for full layers only."""
    nested = fields.optional("rope_parameters") or {}
    if isinstance(nested.get(kind), Mapping):
        values = {"rope_parameters": nested}
    else:
        values = {
            "rope_theta": _one_value(fields, "rope_theta", types, kind, 10_000.0),
            "partial_rotary_factor": _one_value(fields, "partial_rotary_factors", types, kind, 1.0),
            "rope_scaling": fields.optional("rope_scaling") if kind == FULL else None,
        }
    values["max_position_embeddings"] = fields.optional("max_position_embeddings")
    return rope_settings(Fields(values, fields.source), kind)


def _one_value(
    fields: Fields, name: str, types: tuple[str, ...], kind: str, default: float
) -> float:
    if not isinstance(fields.optional(name), list):
        return fields.number(name, default)
    values = _per_layer(fields, name, len(types)) or []
    found = {value for value, own in zip(values, types, strict=True) if own == kind}
    if len(found) != 1:
        raise fields.unsupported(name, f"one value for all {kind} layers")
    return Fields({name: found.pop()}, fields.source).number(name)


class HeadGatedAttention(Layer):
    """Grouped attention; each head's result is multiplied by the sigmoid of the head's own gate."""

    def __init__(self, args: Step3p7Args, layer: int, build: Build) -> None:
        super().__init__(build)
        heads = args.sliding_heads if args.types[layer] == SLIDING else args.heads
        query, key = heads * args.head_dim, args.kv_heads * args.head_dim
        self.q_proj = Linear(args.width, query, build)
        self.k_proj = Linear(args.width, key, build)
        self.v_proj = Linear(args.width, key, build)
        self.g_proj = Linear(args.width, heads, build)
        self.o_proj = Linear(query, args.width, build)
        self.q_norm = HeadNorm(args.head_dim, args.eps, build, _ONE)
        self.k_norm = HeadNorm(args.head_dim, args.eps, build, _ONE)
        self.site = layer
        self.spec = AttentionSpec(
            heads=heads,
            kv_heads=args.kv_heads,
            head_dim=args.head_dim,
            scale=args.scale,
            window=args.windows[layer],
            dtype=build.dtype_name,
        )

    def forward(self, x: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.spec.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        weights = self.q_norm.weight, self.k_norm.weight
        q, k = self.ops.qk_norm_rope(q, k, *weights, self.q_norm.eps, *rotary)
        by_head = attend(self.site, q, k, v).flatten(0, 1)
        gated = self.ops.sigmoid_mul(self.g_proj(x).view(-1, 1), by_head)
        result: Tensor = self.o_proj(gated.view(len(x), -1))
        return result

    def problems(self) -> Iterable[Problem]:
        spec = self.spec
        sizes = {"heads": spec.heads, "kv_heads": spec.kv_heads, "head_dim": spec.head_dim}
        yield self.build.problem("qk_norm_rope", **sizes)
        yield self.build.problem("sigmoid_mul", width=spec.head_dim)


class ClampedMLP(GatedMLP):
    """With a limit above 0 the activation is clamped."""

    def __init__(self, width: int, inner: int, limit: float, build: Build) -> None:
        super().__init__(width, inner, build, "clamped_swiglu" if limit else "silu_mul")
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        if not self.limit:
            return super().forward(x)
        gate, up = self.gate_proj(x), self.up_proj(x)
        inner = self.ops.clamped_swiglu(gate, up, self.limit, 1.0, 0.0, clamp_after=True)
        result: Tensor = self.down_proj(inner)
        return result


class Step3p7Experts(nn.Module):
    """A layer's mixture. Every token takes the shared expert, at weight 1."""

    def __init__(self, args: Step3p7Args, layer: int, build: Build) -> None:
        super().__init__()
        self.ops = build.ops
        self.gate = SigmoidRouter(
            args.width, args.experts, args.top_k, build, scale=args.route_scale
        )
        sizes = args.experts, args.expert_inner, args.width
        self.experts = Experts(*sizes, build, "moe_experts")
        limit = args.shared_limits[layer]
        self.shared_experts = ClampedMLP(args.width, args.shared_inner, limit, build)
        self.limit = args.limits[layer]

    def forward(self, x: Tensor) -> Tensor:
        weights, experts = self.gate(x)
        stacked = self.experts.gate_up_proj.matrix, self.experts.down_proj.matrix
        form = {"limit": self.limit, "clamp_after": True} if self.limit else {}
        routed: Tensor = self.ops.moe_experts(x, experts, weights, *stacked, **form)
        return routed + self.shared_experts(x)


class Step3p7Model(TrunkModel):
    def __init__(self, fields: Fields, build: Build) -> None:
        super().__init__()
        self.args = args = Step3p7Args.read(fields)
        attentions = [HeadGatedAttention(args, layer, build) for layer in range(args.layers)]
        self._specs = [attention.spec for attention in attentions]
        blocks = (
            LlamaBlock(attention, self._mlp(layer, build), args, build, _ONE)
            for layer, attention in enumerate(attentions)
        )
        self.model = LlamaTrunk(blocks, args, build, _ONE)
        self.lm_head = None if args.tied else Linear(args.width, args.vocabulary, build)
        self.ropes = nn.ModuleDict(
            {kind: Rope(settings, args.head_dim, build) for kind, settings in args.ropes.items()}
        )
        seen = vision_args(fields)
        self.vision = None if seen is None else Step3p7Vision(seen, build)
        self.image_token = 0 if seen is None else fields.positive("image_token_id")

    def _mlp(self, layer: int, build: Build) -> nn.Module:
        args = self.args
        if args.sparse[layer]:
            return Step3p7Experts(args, layer, build)
        return ClampedMLP(args.width, args.inner, args.shared_limits[layer], build)

    def attention_specs(self) -> Sequence[AttentionSpec]:
        return self._specs

    def images(self) -> ImageInput | None:
        if self.vision is None:
            return None
        return ImageInput(self.image_token, MERGE, self.vision.patch_values, sequential=True)

    def image_rows(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        if self.vision is None:
            return super().image_rows(patches, grids)
        rows: Tensor = self.vision(patches, grids)
        return rows

    def forward(
        self, token_ids: Tensor, positions: Tensor, step: Step, images: ImageRows | None = None
    ) -> Tensor:
        x, residual = self.model.embed_tokens(token_ids), None
        if images is not None:
            x = images.placed(x)
        rotary = {kind: rope(positions) for kind, rope in self.ropes.items()}
        for kind, block in zip(self.args.types, self.model.layers, strict=True):
            x, residual = block(x, residual, rotary[kind], step)
        return self.model.norm.add(x, residual)[0]

    def placement(self, name: str) -> Placement | None:
        """Layers behind the last predict a second token; they are known and not used. Checkpoints
        keep gate and up as two stacks."""
        if layer_of(name) >= self.args.layers:
            return None
        if name.startswith("vision."):
            return Placement(tower_name(name))
        block, moe, part = name.partition(".moe.")
        if not moe:
            return Placement(name.replace(".share_expert.", ".mlp.shared_experts."))
        rows = self.args.expert_inner
        every = slice(0, self.args.experts)
        places = {
            "gate.weight": Placement(f"{block}.mlp.gate.weight"),
            "router_bias": Placement(f"{block}.mlp.gate.e_score_correction_bias"),
            "gate_proj.weight": Placement(_stack(block, "gate_up"), (every, slice(0, rows))),
            "up_proj.weight": Placement(_stack(block, "gate_up"), (every, slice(rows, 2 * rows))),
            "down_proj.weight": Placement(_stack(block, "down")),
        }
        return places.get(part, Placement(name))


def _stack(block: str, which: str) -> str:
    return f"{block}.mlp.experts.{which}_proj.weight"
