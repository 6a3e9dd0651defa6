"""Tiny random Step-3.7-Flash models: transformers' own, saved under the published names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from .tiny_models import randomised

FULL, SLIDING = "full_attention", "sliding_attention"
VOCAB = 256
LAYERS = 5
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "head_dim": 16,
    "sliding_window": 8,
    "moe_intermediate_size": 32,
    "moe_router_scaling_factor": 3.0,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 1,
    "eos_token_id": 2,
}
TEXT: dict[str, Any] = {
    **SIZES,
    "num_key_value_heads": 2,
    "num_sliding_attention_heads": 6,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "share_expert_dim": 32,
    "layer_types": [FULL, SLIDING, SLIDING, SLIDING, FULL],
    "mlp_layer_types": ["dense", "dense", "sparse", "sparse", "sparse"],
    "swiglu_limits": [0, 0, 0, 0.5, 0.5],
    "swiglu_limits_shared": [0, 0.75, 0, 0.25, 0.25],
    "rope_theta": [5000000, 10000, 10000, 10000, 5000000],
    "partial_rotary_factors": [0.5, 1, 1, 1, 0.5],
}
PUBLISHED: dict[str, Any] = {
    **SIZES,
    "num_attention_groups": 2,
    "attention_other_setting": {
        "attention_type": SLIDING,
        "num_attention_heads": 6,
        "num_attention_groups": 2,
        "head_dim": 16,
    },
    "moe_num_experts": 8,
    "moe_top_k": 2,
    "share_expert_dim": 32,
    "num_nextn_predict_layers": 1,
    "moe_layers_enum": "2,3,4",
    "layer_types": [FULL, SLIDING, SLIDING, SLIDING, FULL, SLIDING],
    "swiglu_limits": [0, 0, 0, 0.5, 0.5, 0],
    "swiglu_limits_shared": [0, 0.75, 0, 0.25, 0.25, 0],
    "rope_theta": [5000000, 10000, 10000, 10000, 5000000, 10000],
    "partial_rotary_factors": [0.5, 1, 1, 1, 0.5, 1],
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 2.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 32.0,
        "original_max_position_embeddings": 64,
    },
}
"""The names and the list of layers of the published file, an entry of a second token's layer behind
each list."""
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
    "mlp_ratio": 2.0,
    "max_position_embeddings": 16,
}
NAMES = ("plain", "published")
_FORMS = {"plain": TEXT, "published": PUBLISHED}


def build(name: str, image_token: int = 250, **text: Any) -> Any:
    """transformers' model; the limits are small enough to bind."""
    config = transformers.Step3p7Config(
        text_config={**_FORMS[name], **text},
        vision_config=dict(VISION),
        image_token_id=image_token,
    )
    config._attn_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = randomised(transformers.Step3p7ForConditionalGeneration(config), 0)
    generator = torch.Generator().manual_seed(1)
    for key, buffer in model.named_buffers():
        if key.endswith("e_score_correction_bias"):
            buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
    return model


def save(model: Any, folder: Path, name: str) -> Path:
    """Under the published names, with a layer that predicts a second token."""
    model.save_pretrained(folder)
    if name == "published":
        tensors = load_file(folder / "model.safetensors")
        tensors[f"model.layers.{LAYERS}.enorm.weight"] = torch.ones(SIZES["hidden_size"])
        save_file(tensors, folder / "model.safetensors")
        outer = json.loads((folder / "config.json").read_text())
        own = model.config.text_config
        sizes = {field: getattr(own, field) for field in ("vocab_size", "eos_token_id")}
        outer["text_config"] = {**PUBLISHED, **sizes}
        (folder / "config.json").write_text(json.dumps(outer))
    return folder
