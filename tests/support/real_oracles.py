"""The oracle on real checkpoints: transformers, under configurations stated here from what the
models' authors published, and the prompts that both kinds of test continue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

STEPS = 64
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "1, 2, 3, 5, 8, 13,",
    "日本の首都は東京です。フランスの首都は",
]
# Longer than Gemma's window of 512 tokens.
LONG = "The quick brown fox jumps over the lazy dog, and then it rests for a while. " * 40


SMOLLM2 = transformers.LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    tie_word_embeddings=True,
)
GEMMA3 = transformers.Gemma3TextConfig(
    vocab_size=262144,
    hidden_size=640,
    intermediate_size=2048,
    num_hidden_layers=18,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=256,
    max_position_embeddings=32768,
    rms_norm_eps=1e-6,
    query_pre_attn_scalar=256,
    sliding_window=512,
    layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 3,
    rope_parameters={
        "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    },
)


_LOADED: dict[Path, Any] = {}


def oracle_for(path: Path, config: Any = None) -> Any:
    """Loaded once in a process: dequantising a whole file takes a while."""
    if path not in _LOADED:
        options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
        if config is not None:
            options["config"] = config
        where = (path,) if path.is_dir() else (path.parent,)
        file = {} if path.is_dir() else {"gguf_file": path.name}
        auto = transformers.AutoModelForCausalLM
        _LOADED[path] = auto.from_pretrained(*where, **file, **options).eval()
    return _LOADED[path]


def continuation(oracle: Any, prompt: list[int]) -> list[int]:
    """Its own next `STEPS` greedy tokens, with none of its stopping rules."""
    oracle.generation_config.eos_token_id = None
    whole = oracle.generate(
        torch.tensor([prompt]), max_new_tokens=STEPS, do_sample=False, pad_token_id=0
    )
    return whole[0, len(prompt) :].tolist()
