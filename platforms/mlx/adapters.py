"""Which part of an mlx-lm layer is what, told by the attributes that it carries.

mlx-lm has well over a hundred model files and gains more with each release. None is named here: a
module is recognised by the parts that its arithmetic needs, and what it was taken for is then
checked with numbers (`probe.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.nn as nn

from ...common.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Adapter:
    """`parts`: attributes that the module has, "a|b" one of several. `without`: that it has not.
    `cache`: attributes of mlx-lm's own cache for it, empty when it keeps nothing between steps."""

    name: str
    parts: tuple[str, ...]
    without: tuple[str, ...] = ()
    cache: tuple[str, ...] = ()

    def matches(self, module: Any) -> bool:
        found = all(any(has(module, name) for name in part.split("|")) for part in self.parts)
        return found and not any(has(module, name) for name in self.without)


KEYS = ("update_and_fetch", "offset", "make_mask")
ARRAYS = ("__getitem__", "__setitem__", "lengths", "advance", "make_mask")
RECURRENT = ("A_log", "conv1d", "conv")
ROUTED = ("switch_mlp", "experts", "router")

SOFTMAX = Adapter(
    "softmax attention",
    ("q_proj|qkv_proj|query_key_value|Wqkv|wqkv|c_attn", "o_proj|out_proj|dense|wo|c_proj"),
    ("kv_a_proj_with_mqa", *RECURRENT),
    KEYS,
)
LATENT = Adapter(
    "latent attention (MLA)", ("kv_a_proj_with_mqa", "kv_a_layernorm", "o_proj"), RECURRENT, KEYS
)
DELTA = Adapter(
    "gated delta rule", ("conv1d", "A_log", "dt_bias", "out_proj", "norm"), ("D",), ARRAYS
)
SSM = Adapter("state space", ("conv1d", "A_log", "D", "in_proj", "out_proj"), (), ARRAYS)
CONVOLUTION = Adapter("short convolution", ("conv", "in_proj", "out_proj"), ("A_log",), ARRAYS)
MLP = Adapter(
    "MLP",
    ("down_proj|output_linear|fc2|w2|c_proj", "gate_proj|gate_up_proj|up_proj|input_linear|fc1|w1"),
    ROUTED,
)
MOE = Adapter("mixture of experts", ("switch_mlp|experts", "gate|router"))
NORM = Adapter("norm", ("weight", "eps"), ("down_proj", "o_proj", "out_proj"))

ADAPTERS = (SOFTMAX, LATENT, DELTA, SSM, CONVOLUTION, MLP, MOE, NORM)
MIXERS = tuple(adapter for adapter in ADAPTERS if adapter.cache)


def has(thing: Any, name: str) -> bool:
    """Whether it carries the attribute, and not None."""
    return getattr(thing, name, None) is not None


@dataclass(frozen=True, slots=True)
class Part:
    """One module of a decoder layer and what it was recognised as."""

    path: str  # "layers.3.self_attn"
    module: Any
    adapter: Adapter


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer: exactly one part that remembers, and parts that do not."""

    mixer: Part
    cache: Any  # mlx-lm's own, fresh
    others: tuple[Part, ...]


def recognise(model: Any) -> list[Layer]:
    """The layers of an mlx-lm model. Raises CheckpointError naming the first part that matches no
    adapter, or several, and the attributes that were looked for."""
    layers = list(model.layers)
    pairs = zip(layers, _own_caches(model, len(layers)), strict=True)
    return [_layer(i, layer, cache) for i, (layer, cache) in enumerate(pairs)]


def _own_caches(model: Any, count: int) -> list[Any]:
    if hasattr(model, "make_cache"):
        caches = list(model.make_cache())
    else:
        from mlx_lm.models.cache import KVCache

        caches = [KVCache() for _ in range(count)]
    if len(caches) != count:
        raise CheckpointError(
            f"The model has {count} layers and asks for {len(caches)} caches; this version serves "
            "models in which each layer has its own."
        )
    return caches


def _layer(index: int, layer: Any, cache: Any) -> Layer:
    parts = [
        _part(f"layers.{index}.{name}", child)
        for name, child in layer.children().items()
        if isinstance(child, nn.Module)
    ]
    mixers = [part for part in parts if part.adapter.cache]
    if len(mixers) != 1:
        listed = ", ".join(f"{p.path}: {p.adapter.name}" for p in parts) or "no part"
        raise CheckpointError(
            f"layers.{index} ({_type(layer)}) has {len(mixers)} parts that remember, it must have "
            f"one; recognised: {listed}. Looked for: {_looked_for(MIXERS)}."
        )
    (mixer,) = mixers
    lacking = [name for name in mixer.adapter.cache if not hasattr(cache, name)]
    if lacking:
        raise CheckpointError(
            f"{mixer.path} ({_type(mixer.module)}) was recognised as {mixer.adapter.name}, but the "
            f"model's cache for it ({_type(cache)}) has no {', '.join(lacking)}."
        )
    return Layer(mixer, cache, tuple(part for part in parts if part is not mixer))


def _part(path: str, module: Any) -> Part:
    matching = [adapter for adapter in ADAPTERS if adapter.matches(module)]
    if len(matching) == 1:
        return Part(path, module, matching[0])
    carries = ", ".join(sorted(name for name in module if not name.startswith("_"))) or "nothing"
    if matching:
        names = " and ".join(adapter.name for adapter in matching)
        raise CheckpointError(
            f"{path} ({_type(module)}) looks like {names}; it must be one of them. It carries: "
            f"{carries}."
        )
    raise CheckpointError(
        f"{path} ({_type(module)}) is nothing that this version serves. It carries: {carries}. "
        f"Looked for: {_looked_for(ADAPTERS)}."
    )


def _looked_for(adapters: tuple[Adapter, ...]) -> str:
    return "; ".join(f"{a.name}: {' and '.join(a.parts)}" for a in adapters)


def _type(thing: Any) -> str:
    return f"{type(thing).__module__}.{type(thing).__name__}"


def variant(part: Part, heads: int = 0, kv_heads: int = 0, window: int = 0) -> str:
    """The adapter's name with what distinguishes this module of its kind."""
    words = []
    if part.adapter is SOFTMAX:
        words.append("grouped" if 0 < kv_heads < heads else "plain")
        if gated(part.module, heads):
            words.append("gated")
        if has(part.module, "sinks"):
            words.append("sinks")
    if window:
        words.append(f"window {window}")
    return f"{part.adapter.name} ({', '.join(words)})" if words else part.adapter.name


def query_heads(module: Any) -> int:
    names = ("num_attention_heads", "n_heads", "num_heads", "n_head")
    return next((int(getattr(module, name)) for name in names if has(module, name)), 0)


def gated(module: Any, heads: int) -> bool:
    """Whether half of what the query projection gives is a gate of the output."""
    if not (has(module, "q_proj") and has(module, "head_dim") and heads):
        return False
    weight = module.q_proj.weight
    return bool(weight.shape[0] == 2 * heads * module.head_dim)
