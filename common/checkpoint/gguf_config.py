"""Translates GGUF metadata to the keys of a Hugging Face config.json.

What a file leaves out because every reader of its architecture knows it (Gemma's local RoPE base,
window pattern and query scale) is filled in here.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import CheckpointError
from .fields import Fields
from .gguf_file import GGUFFile

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}
"""GGUF architecture -> model type."""

FREQUENCY_FACTORS = "frequency_factors"
"""A rope type of our own: explicit divisors of the inverse frequencies, under "factors"."""

_GEMMA3_27B_LAYERS = 62
_EOS_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
# Control tokens that end a turn or a text; many files name only one of them as EOS.
_END_TEXTS = frozenset(
    {"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>"}
)
CONTROL = 3
"""Token type of control tokens in `tokenizer.ggml.token_type`."""


def translate(file: GGUFFile) -> dict[str, Any]:
    """The configuration in config.json's keys. Raises CheckpointError."""
    arch = file.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise CheckpointError(
            f"{file.path}: architecture {arch!r} is not supported in GGUF; supported: "
            f"{' '.join(sorted(ARCHITECTURES))}."
        )
    prefix = arch + "."
    values = {k.removeprefix(prefix): v for k, v in file.scalars().items() if k.startswith(prefix)}
    fields = Fields({**values, **_whole_file(file)}, file.path)
    config = _sizes(file, fields)
    config["model_type"] = ARCHITECTURES[arch]
    if arch == "gemma3":
        config |= _gemma3(fields, config)
    else:
        config["rope_parameters"] = _rope(file, fields)
        if fields.optional("attention.sliding_window"):
            config |= _windows(arch, fields)
    return config


def token_ids(file: GGUFFile) -> tuple[frozenset[int], int | None]:
    """(ids that end generation, BOS id or None), from the tokenizer's metadata."""
    prefix = "tokenizer.ggml."
    fields = Fields(file.scalars(), file.path)
    named = [key for key in _EOS_KEYS if fields.optional(prefix + key) is not None]
    ends = {fields.integer(prefix + key) for key in named}
    tokens = file.strings(prefix + "tokens")
    kinds = file.numbers(prefix + "token_type", len(tokens))
    if kinds is not None:
        ends |= {int(i) for i in np.flatnonzero(kinds == CONTROL) if tokens[i] in _END_TEXTS}
    bos = fields.optional(prefix + "bos_token_id")
    return frozenset(ends), None if bos is None else fields.integer(prefix + "bos_token_id")


def _whole_file(file: GGUFFile) -> dict[str, Any]:
    split = file.get("split.count", 1)
    if split > 1:
        raise CheckpointError(
            f"{file.path}: the model is split into {split} files, which is not supported; join "
            "them with `llama-gguf-split --merge`."
        )
    if "token_embd.weight" not in file.tensors:
        raise CheckpointError(f"{file.path}: tensor 'token_embd.weight' is missing.")
    return {"vocab_size": file.tensors["token_embd.weight"].shape[0]}


def _sizes(file: GGUFFile, fields: Fields) -> dict[str, Any]:
    if fields.integer("expert_count", 0):
        raise CheckpointError(
            f"{file.path}: mixture-of-experts models are not supported in GGUF; use the "
            "safetensors version of a Qwen3-MoE model."
        )
    hidden, heads = fields.positive("embedding_length"), fields.positive("attention.head_count")
    head_dim = fields.positive("attention.key_length", hidden // heads)
    if fields.positive("attention.value_length", head_dim) != head_dim:
        raise fields.unsupported("attention.value_length", f"equal to key_length ({head_dim})")
    ends, bos = token_ids(file)
    return {
        "vocab_size": fields.positive("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": fields.positive("feed_forward_length"),
        "num_hidden_layers": fields.positive("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.positive("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": fields.positive("context_length"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "eos_token_id": sorted(ends),
        "bos_token_id": bos,
    }


def _rope(file: GGUFFile, fields: Fields) -> dict[str, Any]:
    kind = fields.text("rope.scaling.type", "none")
    rope: dict[str, Any] = {"rope_theta": fields.number("rope.freq_base", 10000.0)}
    if "rope_freqs.weight" in file.tensors:
        stored = np.frombuffer(file.read_bytes(file.tensors["rope_freqs.weight"]), "<f4")
        return rope | {"rope_type": FREQUENCY_FACTORS, "factors": stored.tolist()}
    if kind == "none":
        return rope | {"rope_type": "default"}
    rope |= {"rope_type": kind, "factor": fields.number("rope.scaling.factor")}
    if kind == "yarn":
        original = fields.positive("rope.scaling.original_context_length")
        rope["original_max_position_embeddings"] = original
        if fields.optional("rope.scaling.attn_factor") is not None:
            # Stored is the factor on top of YaRN's own logarithmic one.
            own = 0.1 * np.log(rope["factor"]) + 1.0
            rope["attention_factor"] = float(own * fields.number("rope.scaling.attn_factor"))
    return rope


def _windows(arch: str, fields: Fields) -> dict[str, Any]:
    if arch != "llama":
        raise fields.unsupported("attention.sliding_window", "0 for this architecture")
    return {"model_type": "mistral", "sliding_window": fields.integer("attention.sliding_window")}


def _gemma3(fields: Fields, config: dict[str, Any]) -> dict[str, Any]:
    layers = config["num_hidden_layers"]
    pattern = fields.positive("attention.sliding_window_pattern", 6)
    full: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": fields.number("rope.freq_base", 1_000_000.0),
    }
    factor = fields.number("rope.scaling.factor", 1.0)
    if factor != 1.0:
        full |= {"rope_type": fields.text("rope.scaling.type", "linear"), "factor": factor}
    local = {"rope_type": "default", "rope_theta": fields.number("rope.freq_base_swa", 10000.0)}
    kinds = ("full_attention", "sliding_attention")
    # The 27B size scales queries by hidden/heads; all others by the head size.
    scalar = config["head_dim"]
    if layers == _GEMMA3_27B_LAYERS:
        scalar = config["hidden_size"] // config["num_attention_heads"]
    return {
        "rope_parameters": {"full_attention": full, "sliding_attention": local},
        "sliding_window": fields.positive("attention.sliding_window"),
        "layer_types": [kinds[bool((i + 1) % pattern)] for i in range(layers)],
        "query_pre_attn_scalar": scalar,
        "final_logit_softcapping": fields.optional("final_logit_softcapping"),
        "hidden_activation": "gelu_pytorch_tanh",
    }
