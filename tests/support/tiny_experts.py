"""Tiny random models with latent attention or with sinks, and experts: transformers' own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

from sixfold.common.checkpoint.block_floats import Mxfp4Rows

from .tiny_models import randomised

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "original_max_position_embeddings": 16}
DEEPSEEK_V3: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "max_position_embeddings": 256,
}
GPT_OSS: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 8,
    "max_position_embeddings": 256,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v3": ("DeepseekV3", DEEPSEEK_V3),
    "deepseek_v3_one_query_product": ("DeepseekV3", {**DEEPSEEK_V3, "q_lora_rank": None}),
    "deepseek_v3_yarn": (
        "DeepseekV3",
        {**DEEPSEEK_V3, "rope_parameters": {**YARN, "factor": 8.0, "mscale": 1.0,
                                            "mscale_all_dim": 1.0, "beta_fast": 32}},
    ),
    "gpt_oss": ("GptOss", GPT_OSS),
    "gpt_oss_yarn": (
        "GptOss",
        {**GPT_OSS, "rope_parameters": {**YARN, "factor": 8.0, "truncate": False}},
    ),
}  # fmt: skip


def build(name: str) -> Any:
    family, changes = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**changes, attn_implementation="eager")
    with torch.random.fork_rng():
        torch.manual_seed(0)  # vectors keep what they begin with
        model = randomised(getattr(transformers, f"{family}ForCausalLM")(config), 0)
    generator = torch.Generator().manual_seed(1)
    for key, buffer in model.named_buffers():
        if key.endswith("e_score_correction_bias"):
            buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
    for key, parameter in model.named_parameters():
        if "gate_up_proj" in key and parameter.dim() == 3:  # so that the activation's limits bind
            parameter.data.mul_(8.0)
    return model


def save(model: Any, folder: Path) -> Path:
    """As published: every tensor by its name, experts stacked as transformers holds them."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    if model.config.model_type == "deepseek_v3":
        layers = model.config.num_hidden_layers  # the layer that predicts a second token
        tensors[f"model.layers.{layers}.enorm.weight"] = torch.ones(model.config.hidden_size)
    save_file(tensors, folder / "model.safetensors")
    return folder


def write_mxfp4(path: Path, folder: Path, oracle: Any) -> dict[str, torch.Tensor]:
    """The checkpoint at `path` in `folder`, its experts random stacks in MXFP4, whose values
    the oracle is given. The tensors written."""
    tensors = load_file(path / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", ".down_proj"))]:
        blocks, scales, values = mxfp4_stack(tensors.pop(name))
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, scales
        oracle.get_parameter(name).data.copy_(values)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return tensors


def mxfp4_stack(like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the shape of `like` (experts, k, n): blocks, scales, and the values that they are."""
    rng = np.random.default_rng(0)
    experts, k, n = like.shape
    codes = rng.integers(0, 256, (experts, n, k // 32, 16), dtype=np.uint8)
    scales = rng.integers(121, 126, (experts, n, k // 32), dtype=np.uint8)
    rows = [Mxfp4Rows(c.reshape(n, -1), s).values().T for c, s in zip(codes, scales, strict=True)]
    return torch.from_numpy(codes), torch.from_numpy(scales), torch.from_numpy(np.stack(rows))
