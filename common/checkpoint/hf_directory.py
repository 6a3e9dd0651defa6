"""Reads the configuration of a Hugging Face model directory: config.json and what surrounds it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .quantization_config import DESCRIBED, packed_scheme

_QWEN3_5 = {
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.25,
    "num_key_value_heads": 4,
    "head_dim": 256,
}

_FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "rope_theta": 10000.0},
    "mistral": {
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131072,
        "rope_theta": 10000.0,
        "num_key_value_heads": 8,
    },
    "qwen2": {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "rope_theta": 10000.0},
    "qwen3": {
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "rope_theta": 10000.0,
        "head_dim": 128,
    },
    "qwen3_moe": {
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "rope_theta": 10000.0,
        "num_key_value_heads": 4,
    },
    "qwen3_5_text": _QWEN3_5,
    "qwen3_5_moe_text": {**_QWEN3_5, "num_experts": 256, "num_experts_per_tok": 8},
    "step3p5": {
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 128000,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "n_routed_experts": 288,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 1280,
        "share_expert_dim": 1280,
    },
    "gemma3_text": {
        "vocab_size": 262208,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131072,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    },
}
"""What published configurations leave out, as `transformers` fills it in (5.x)."""

_TEXT_TYPES = {
    "gemma3": "gemma3_text",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
    "step3p7": "step3p5",
}
"""Model type of the text part where a multimodal configuration does not say it."""


def read_json(path: Path) -> Any:
    """Parse a JSON file; None when it does not exist. Raises CheckpointError."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); download it again.") from None


def read_object(path: Path) -> dict[str, Any] | None:
    """Like `read_json`, for files that must hold an object."""
    value = read_json(path)
    if value is not None and not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, not {type(value).__name__}.")
    return value


def read_config(directory: Path) -> dict[str, Any]:
    """The text model's configuration with family defaults filled in; `model_type` is always set.

    Multimodal configurations are flattened: the text part wins over the outer object.
    """
    path = directory / "config.json"
    outer = read_object(path)
    if outer is None:
        raise CheckpointError(
            f"{directory}: no config.json; a model directory holds config.json, *.safetensors and "
            "tokenizer.json (a GGUF model is named by its .gguf file)."
        )
    text = outer.get("text_config")
    config = dict(outer)
    if isinstance(text, dict):
        outer_type = outer.get("model_type")
        config |= {"model_type": _TEXT_TYPES.get(str(outer_type), outer_type)}
        config |= {key: value for key, value in text.items() if value is not None}
    described = _description(directory)
    if described is not None:
        config["quantization_config"] = {DESCRIBED: "", **described}
    packed_scheme(config, path)  # refuses what there is no scheme for
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{path}: field 'model_type' is missing; it names the architecture.")
    defaults = _FAMILY_DEFAULTS.get(config["model_type"], {})
    config |= {key: value for key, value in defaults.items() if config.get(key) is None}
    if config["model_type"] == "mistral":
        config.setdefault("sliding_window", 4096)
    return config


def _description(directory: Path) -> dict[str, Any] | None:
    """msModelSlim's list of tensors and their types, whose file some releases name by the type."""
    files = sorted(directory.glob("quant_model_description*.json"))
    return read_object(files[0]) if files else None


def eos_ids(directory: Path, config: Mapping[str, Any]) -> frozenset[int]:
    """Every id that ends generation, by config.json, generation_config.json and the tokenizer."""
    generation = read_object(directory / "generation_config.json") or {}
    ids = {*_ids(config.get("eos_token_id")), *_ids(generation.get("eos_token_id"))}
    named = token_content((read_object(directory / "tokenizer_config.json") or {}).get("eos_token"))
    if named is not None:
        ids |= {
            id for content, id in _added_tokens(directory / "tokenizer.json") if content == named
        }
    return frozenset(ids)


def token_content(value: Any) -> str | None:
    """The text of a special token, which files give as a string or as an object."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _ids(value: Any) -> Iterable[int]:
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool)]


def _added_tokens(path: Path) -> list[tuple[str, int]]:
    """(content, id) of the added tokens, without parsing the vocabulary that fills the file."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return []  # loading the tokenizer reports what is wrong with it
    at = text.find('"added_tokens"')
    start = text.find("[", at)
    if at < 0 or start < 0:
        return []
    try:
        entries, _ = json.JSONDecoder().raw_decode(text, start)
    except ValueError:
        return []
    return [(e.get("content", ""), e["id"]) for e in entries if isinstance(e, dict) and "id" in e]
