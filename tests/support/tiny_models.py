"""Tiny random transformers models of every family: the oracle that ours are compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR: dict[str, Any] = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
GEMMA3: dict[str, Any] = {
    "num_hidden_layers": 7,
    "head_dim": 32,
    "sliding_window": 8,
    "query_pre_attn_scalar": 24,
}


@dataclass(frozen=True)
class Tiny:
    """A family name of transformers and what its configuration changes."""

    family: str
    changes: dict[str, Any] = field(default_factory=dict)

    def config(self) -> Any:
        text = "TextConfig" if self.family == "Gemma3" else "Config"
        config_class: Callable[..., Any] = getattr(transformers, self.family + text)
        return config_class(**{**SIZES, **self.changes}, attn_implementation="eager")

    def model(self, seed: int = 0) -> Any:
        """The model in float32, every vector (norm, bias) random, matrices of useful size."""
        model = getattr(transformers, self.family + "ForCausalLM")(self.config())
        return randomised(model, seed)


TINY = {
    "llama": Tiny("Llama"),
    "llama_tied_own_head_dim": Tiny("Llama", {"tie_word_embeddings": True, "head_dim": 24}),
    "llama_biases": Tiny("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_one_kv_head": Tiny("Llama", {"num_attention_heads": 3, "num_key_value_heads": 1,
                                        "hidden_size": 48}),
    "llama_linear": Tiny("Llama", {"rope_parameters": LINEAR}),
    "llama_llama3": Tiny("Llama", {"rope_parameters": LLAMA3}),
    "llama_yarn": Tiny("Llama", {"rope_parameters": YARN}),
    "llama_yarn_mscale": Tiny(
        "Llama", {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2, "beta_fast": 8}}
    ),
    "llama_yarn_untruncated": Tiny("Llama", {"rope_parameters": {**YARN, "truncate": False}}),
    "mistral_window": Tiny("Mistral", {"sliding_window": 8}),
    "mistral_no_window": Tiny("Mistral", {"sliding_window": None}),
    "qwen2": Tiny("Qwen2"),
    "qwen2_window": Tiny(
        "Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    ),
    "qwen2_window_off": Tiny("Qwen2", {"use_sliding_window": False, "sliding_window": 8}),
    "qwen3": Tiny("Qwen3", {"head_dim": 32}),
    "qwen3_window": Tiny(
        "Qwen3",
        {"head_dim": 32, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    ),
    "qwen3_moe": Tiny(
        "Qwen3Moe",
        {"head_dim": 32, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40},
    ),
    "qwen3_moe_some_dense": Tiny(
        "Qwen3Moe",
        {
            "head_dim": 32,
            "num_experts": 4,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    "gemma3": Tiny("Gemma3", GEMMA3),
    "gemma3_linear": Tiny(
        "Gemma3",
        {
            **GEMMA3,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "gemma3_logit_cap": Tiny(
        "Gemma3", {**GEMMA3, "final_logit_softcapping": 5.0}
    ),
}  # fmt: skip


def randomised(model: Any, seed: int) -> Any:
    """Vectors away from their 0 and 1 so that a forgotten norm or bias shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.3 * noise)
            elif "embed" in name or parameter.dim() > 1:
                parameter.copy_(0.15 * noise)
    return model.eval()


def gemma3_multimodal(seed: int = 0) -> Any:
    """Gemma 3 with a vision tower: its text tensors carry another prefix."""
    text = {**SIZES, **GEMMA3}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=255
    )
    return randomised(transformers.Gemma3ForConditionalGeneration(config), seed)


def prompt(length: int = 40, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 250, (length,), generator=generator)


def expected_logits(model: Any, token_ids: Tensor) -> Tensor:
    """(T, vocabulary) by transformers."""
    with torch.inference_mode():
        return model(input_ids=token_ids[None]).logits[0].float()


def save(model: Any, path: Path, **options: Any) -> Path:
    model.save_pretrained(path, **options)
    return path
