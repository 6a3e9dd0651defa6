"""A tiny random Llama on the toy's byte tokenizer: a model of real layers that any torch platform
serves at once, for platforms that are emulated. Made without transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from toy_checkpoint import END, VOCABULARY, write_toy_checkpoint

WIDTH, INNER, HEADS, KV_HEADS, LAYERS = 64, 96, 4, 2, 2


def write_babbler(path: Path, max_context: int) -> Path:
    """float16; heads of 16 numbers, as many as the vendor's attention takes at least."""
    write_toy_checkpoint(path, max_context=max_context)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": max_context,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "eos_token_id": END,
        "torch_dtype": "float16",
    }
    (path / "config.json").write_text(json.dumps(config, indent=1))
    rng = np.random.default_rng(0)
    tensors = {name: _values(rng, shape) for name, shape in _shapes().items()}
    tensors["lm_head.weight"][~_printable()] = 0
    save_file(tensors, path / "model.safetensors")
    return path


def _shapes() -> dict[str, tuple[int, ...]]:
    keys = WIDTH // HEADS * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, WIDTH),
        "lm_head.weight": (VOCABULARY, WIDTH),
        "model.norm.weight": (WIDTH,),
    }
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (WIDTH,),
        "post_attention_layernorm": (WIDTH,),
        "self_attn.q_proj": (WIDTH, WIDTH),
        "self_attn.k_proj": (keys, WIDTH),
        "self_attn.v_proj": (keys, WIDTH),
        "self_attn.o_proj": (WIDTH, WIDTH),
        "mlp.gate_proj": (INNER, WIDTH),
        "mlp.up_proj": (INNER, WIDTH),
        "mlp.down_proj": (WIDTH, INNER),
    }
    for number in range(LAYERS):
        shapes |= {f"model.layers.{number}.{name}.weight": s for name, s in layer.items()}
    return shapes


def _printable() -> np.ndarray:
    """Tokens that greedy answers consist of: half a character has no place in a text."""
    tokens = np.arange(VOCABULARY)
    return (tokens >= ord(" ")) & (tokens <= ord("~"))


def _values(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Norms about one, matrices that keep the size of what they multiply."""
    if len(shape) == 1:
        return (1 + 0.1 * rng.standard_normal(shape)).astype(np.float16)
    return (rng.standard_normal(shape) * 1.5 * shape[1] ** -0.5).astype(np.float16)
