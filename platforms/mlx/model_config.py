"""The keys of a configuration under the names that mlx-lm's model files read.

transformers 5 nests what turns positions into angles under `rope_parameters`. Most of mlx-lm's
files know the older flat keys only, and take a default for a key that they do not find: the model
then loads, runs at full speed, and answers wrongly. So the flat keys are filled in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...common.checkpoint.gguf_config import FREQUENCY_FACTORS

PLAIN = ("default", None)
SLIDING, FULL = "sliding_attention", "full_attention"
HYBRID_WORDS = {"linear_attention": "mamba", FULL: "attention"}
"""Kinds of layers beside state space: in transformers 5, and as mlx-lm's file reads them."""


def for_mlx_lm(config: Mapping[str, Any]) -> dict[str, Any]:
    """What to add to (or replace in) a configuration, the text part included."""
    added = _flat(config)
    text = config.get("text_config")
    if isinstance(text, Mapping):
        if inner := _flat(text):
            added["text_config"] = {**text, **inner}
        if "vocab_size" in text and "vocab_size" not in config:
            added["vocab_size"] = text["vocab_size"]  # a wrapper's own default would win
    return added


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    return {**_angles(config), **_layers(config)}


def _layers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Names of transformers 5 for how layers differ and how many experts there are."""
    result: dict[str, Any] = {}
    experts = config.get("num_local_experts")
    if "moe_intermediate_size" in config and "num_experts" not in config and experts is not None:
        result["num_experts"] = experts
    types = config.get("layer_types")
    if not isinstance(types, list):
        return result
    if "mamba_d_state" in config and "linear_attention" in types:
        result["layer_types"] = [HYBRID_WORDS.get(kind, kind) for kind in types]
    if {SLIDING, FULL} == set(types) and "_sliding_window_pattern" in config:
        every = types.index(FULL) + 1
        if types == [FULL if (i + 1) % every == 0 else SLIDING for i in range(len(types))]:
            result["sliding_window_pattern"] = every
    return result


def _angles(config: Mapping[str, Any]) -> dict[str, Any]:
    rope = config.get("rope_parameters")
    if not isinstance(rope, Mapping):
        return {}
    if "full_attention" in rope:  # one for each kind of layer
        local = rope.get("sliding_attention", {})
        result = _of_one(config, rope["full_attention"])
        if "rope_theta" in local and "rope_local_base_freq" not in config:
            result["rope_local_base_freq"] = local["rope_theta"]
        return result
    return _of_one(config, rope)


def _of_one(config: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    if "rope_theta" in rope and "rope_theta" not in config:
        result["rope_theta"] = rope["rope_theta"]
    if "partial_rotary_factor" in rope and "partial_rotary_factor" not in config:
        result["partial_rotary_factor"] = rope["partial_rotary_factor"]
    kind = rope.get("rope_type", rope.get("type"))
    if config.get("rope_scaling") is None and kind not in PLAIN:
        result["rope_scaling"] = _scaling(config, rope, kind)
    return result


def _scaling(config: Mapping[str, Any], rope: Mapping[str, Any], kind: Any) -> dict[str, Any]:
    if kind != FREQUENCY_FACTORS:
        return dict(rope)
    # GGUF's explicit divisors: longrope has such, and scales nothing when the lengths are equal.
    factors = list(rope["factors"])
    return {
        "type": "longrope",
        "short_factor": factors,
        "long_factor": factors,
        "original_max_position_embeddings": config["max_position_embeddings"],
    }
