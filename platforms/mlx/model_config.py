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


def for_mlx_lm(config: Mapping[str, Any]) -> dict[str, Any]:
    """What to add to (or replace in) a configuration, the text part included."""
    added = _flat(config)
    text = config.get("text_config")
    if isinstance(text, Mapping) and (inner := _flat(text)):
        added["text_config"] = {**text, **inner}
    return added


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
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
