"""Tiny random models as mlx-lm builds them, one for each family that the MLX platform must serve,
and mlx-lm's own greedy continuation of a prompt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import _get_classes, load_model

from sixfold.common.ops.sample import sample
from sixfold.common.ops.sample_cases import sampling_arrays
from sixfold.common.random import uniform
from sixfold.common.sampling import SamplingParams

VOCAB = 61
_BASE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
}
_GATED_DELTA = {
    "num_hidden_layers": 4,
    "head_dim": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "full_attention_interval": 4,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [1, 1, 0],
    },
}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**_BASE, "tie_word_embeddings": True},
    "mistral": {**_BASE, "head_dim": 8, "tie_word_embeddings": False},
    "qwen2": {**_BASE, "tie_word_embeddings": True},
    "qwen3": {**_BASE, "head_dim": 8, "tie_word_embeddings": False},
    "qwen3_moe": {
        **_BASE,
        **_EXPERTS,
        "head_dim": 8,
        "tie_word_embeddings": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0],
        "norm_topk_prob": True,
    },
    "qwen3_5": {**_BASE, **_GATED_DELTA, "tie_word_embeddings": True},
    "qwen3_5_moe": {
        **_BASE,
        **_GATED_DELTA,
        **_EXPERTS,
        "shared_expert_intermediate_size": 16,
        "tie_word_embeddings": False,
    },
    "gemma3_text": {
        **_BASE,
        "num_hidden_layers": 6,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "sliding_window": 8,
        "sliding_window_pattern": 3,
        "query_pre_attn_scalar": 8,
        "rope_local_base_freq": 10000.0,
    },
    "gpt_oss": {
        **_BASE,
        "num_hidden_layers": 4,
        "intermediate_size": 32,
        "head_dim": 8,
        "sliding_window": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_scaling": None,
    },
    "deepseek_v3": {
        **_BASE,
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 16,
        "n_shared_experts": 1,
        "n_routed_experts": 4,
        "routed_scaling_factor": 1.0,
        "kv_lora_rank": 16,
        "q_lora_rank": 24,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "qk_nope_head_dim": 8,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    "phi3": {**_BASE},
    "smollm3": {
        **_BASE,
        "num_hidden_layers": 4,
        "tie_word_embeddings": True,
        "no_rope_layer_interval": 4,
    },
    "granite": {
        **_BASE,
        "logits_scaling": 2.0,
        "attention_multiplier": 0.3,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "granitemoehybrid": {
        **_BASE,
        "num_hidden_layers": 4,
        "intermediate_size": 16,
        "attention_bias": False,
        "embedding_multiplier": 2.0,
        "attention_multiplier": 0.3,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
        "layer_types": ["mamba", "mamba", "attention", "mamba"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_proj_bias": False,
        "mamba_d_state": 8,
        "mamba_d_conv": 4,
        "mamba_n_groups": 1,
        "mamba_conv_bias": True,
        "position_embedding_type": "nope",
    },
}
HYBRID = ("qwen3_5", "qwen3_5_moe", "granitemoehybrid")


def build(name: str, **changes: Any) -> Any:
    """A random model; matrices large enough, and embeddings small enough where they are the head
    too, that the next token depends on the whole context and not on the last one alone."""
    config = {"model_type": name, **CONFIGS[name], **changes}
    model_class, arguments = _get_classes(config)
    model = model_class(arguments.from_dict(config))
    if name == "gemma3_text":
        model.sanitize({})  # ties the head
    rng = np.random.default_rng(3)
    embedding = 0.2 / config.get("embedding_multiplier", 1.0) ** 2

    def random(path: str, old: mx.array) -> mx.array:
        if path.endswith("A_log"):  # a state that remembers
            return mx.array(rng.uniform(-5.0, -1.0, old.shape).astype(np.float32))
        if path.endswith(("dt_bias", "norm.weight", "D")) or old.ndim == 1:
            return mx.array(rng.uniform(0.2, 1.0, old.shape).astype(np.float32))
        scale = embedding if "embed_tokens" in path else 1.5 / np.sqrt(old.shape[-1])
        return mx.array((rng.standard_normal(old.shape) * scale).astype(np.float32))

    model.update(tree_map_with_path(random, model.parameters()))
    model.eval()
    mx.eval(model.parameters())
    return model


def write(folder: Path, name: str, **changes: Any) -> Path:
    """The model as a directory that mlx-lm loads, without a tokenizer."""
    folder.mkdir(parents=True)
    model = build(name, **changes)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    config = {"model_type": name, **CONFIGS[name], **changes}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def own_sampled(
    folder: Path, prompt: Sequence[int], params: SamplingParams, steps: int
) -> list[int]:
    """What the contract of `sample` gives on mlx-lm's logits, the whole text run anew each time."""
    model, _ = load_model(folder)
    text = list(prompt)
    for _ in range(steps):
        logits = np.array(model(mx.array([text]))[0, -1:].astype(mx.float32))
        draw = uniform(np.array([params.seed or 0]), np.array([len(text)]))
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        names += ("presence_penalty", "frequency_penalty")
        row = {name: getattr(params, name) for name in names}
        row |= {"bias": params.logit_bias, "uniform": draw[0]}
        row |= {"prompt": text[: len(prompt)], "output": text[len(prompt) :]}
        text.append(int(sample(logits, sampling_arrays([row]))[0]))
    return text[len(prompt) :]


def own_greedy(folder: Path, prompts: Sequence[Sequence[int]], steps: int) -> list[list[int]]:
    """mlx-lm's continuation of each prompt alone: the whole prompt, then token by token."""
    model, _ = load_model(folder)
    return greedy_of(model, prompts, steps)


def greedy_of(model: Any, prompts: Sequence[Sequence[int]], steps: int) -> list[list[int]]:
    result = []
    for prompt in prompts:
        cache = make_prompt_cache(model)
        new, made = list(prompt), []
        for _ in range(steps):
            logits = model(mx.array([new]), cache=cache)[0, -1].astype(mx.float32)
            new = [int(mx.argmax(logits))]
            made += new
        result.append(made)
    return result
