"""Tiny random Qwen3.5 checkpoints as published: multimodal names and configuration, and what
transformers computes with the same weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

VOCAB = 512
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "full_attention_interval": 4,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [3, 3, 2],
        "mrope_interleaved": True,
    },
    "eos_token_id": 1,
    "bos_token_id": None,
    "pad_token_id": None,
}
VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "hidden_act": "gelu_pytorch_tanh",
    "intermediate_size": 64,
    "num_heads": 2,
    "in_channels": 3,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 64,
}
TOKENS: dict[str, Any] = {
    "image_token_id": 500,
    "video_token_id": 501,
    "vision_start_token_id": 502,
    "vision_end_token_id": 503,
}
EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
NAMES = ("dense", "moe")


def build(name: str, seed: int = 0, **text: Any) -> Any:
    """transformers' model with random weights; what starts at zero or one is moved away."""
    fields = {**TEXT, **text}
    family = "Qwen3_5"
    if name == "moe":
        family = "Qwen3_5Moe"
        fields = {**fields, **EXPERTS}
        del fields["intermediate_size"]
    config = getattr(transformers, f"{family}Config")(
        text_config=fields, vision_config=VISION, tie_word_embeddings=False, **TOKENS
    )
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(_random(key, parameter, generator))
    return model.float().eval()


def _random(key: str, parameter: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(parameter.shape, generator=generator)
    if key.endswith("A_log"):
        return (0.05 + 4 * torch.rand(parameter.shape, generator=generator)).log()
    if key.endswith("dt_bias"):
        return noise
    if key.endswith("linear_attn.norm.weight"):
        return 1 + 0.1 * noise
    if key.endswith("conv1d.weight"):
        return 0.5 * noise
    if parameter.dim() == 1:
        ones = 1.0 if "visual" in key and "norm" in key and key.endswith("weight") else 0.0
        return ones + 0.1 * noise
    return 0.1 * noise


def save(model: Any, folder: Path) -> Path:
    """As published: raw names, experts stacked, and a head for a second token that nobody reads."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    if "lm_head.weight" in tensors and model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    tensors["mtp.norm.weight"] = torch.ones(TEXT["hidden_size"])
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    return folder


def write(folder: Path, name: str, **text: Any) -> tuple[Path, Any]:
    model = build(name, **text)
    return save(model, folder), model


def logits(model: Any, tokens: Sequence[int]) -> Tensor:
    """(T, vocabulary) float32, the whole text at once."""
    with torch.inference_mode():
        return model(input_ids=torch.tensor([list(tokens)])).logits[0].float()


def greedy(model: Any, prompt: Sequence[int], steps: int) -> list[int]:
    """transformers' own generation over its cache."""
    with torch.inference_mode():
        made = model.generate(
            input_ids=torch.tensor([list(prompt)]), max_new_tokens=steps, min_new_tokens=steps,
            do_sample=False, eos_token_id=None,
        )  # fmt: skip
    return made[0, len(prompt) :].tolist()
