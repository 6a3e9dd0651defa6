"""A tiny random Qwen3.5 with its vision tower, by transformers: the oracle of image input."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Qwen3_5Config
from transformers.models.qwen3_5.modeling_qwen3_5 import (
    Qwen3_5ForConditionalGeneration,
    Qwen3_5VisionModel,
)

IMAGE, START, END = 300, 302, 303
"""Token ids: the placeholder of an image's rows, and what stands around them."""

TEXT: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "full_attention_interval": 4,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [3, 3, 2],
        "mrope_interleaved": True,
    },
    "eos_token_id": 257,
    "bos_token_id": None,
    "pad_token_id": None,
}
VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 36,
}


def tiny_config(**vision: Any) -> Any:
    return Qwen3_5Config(
        text_config=TEXT,
        vision_config={**VISION, **vision},
        image_token_id=IMAGE,
        video_token_id=301,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )


def tiny_tower(seed: int = 0, **vision: Any) -> Any:
    """The vision tower alone, float32."""
    config = tiny_config(**vision).vision_config
    config._attn_implementation = "eager"
    return randomised(Qwen3_5VisionModel(config), seed)


def tiny_qwen(seed: int = 0) -> Any:
    """The whole model, float32."""
    return randomised(Qwen3_5ForConditionalGeneration(tiny_config()), seed)


def randomised(model: Any, seed: int) -> Any:
    """Every tensor away from 0 and 1, so that a forgotten one shows; the recurrence stays tame."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("A_log"):
                parameter.copy_(torch.rand(parameter.shape, generator=generator).add(0.05).log())
            elif "conv1d" in name:
                parameter.copy_(0.5 * noise)
            elif parameter.dim() == 1:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
    return model.eval()
