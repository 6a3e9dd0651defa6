"""What Step-3.5-Flash is built from, from either form of its configuration: the published one, with
a list of all layers for most things, and that of `transformers`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from ..common.checkpoint.fields import Fields
from .llama import common_args
from .rope import rope_settings
from .windows import FULL, layer_types, window_sizes

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
