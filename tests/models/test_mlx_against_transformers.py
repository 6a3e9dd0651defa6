"""Contract: checkpoints of Qwen3.5, dense and mixture of experts, in their published form
(multimodal nesting, zero-centred norms, fused experts), give transformers' greedy tokens on the MLX
platform: alone, batched, and after a restored state."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from support.run_mlx import complete, running

from sixfold.common.sampling import SamplingParams

TEXT: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
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
    "initializer_range": 0.1,
    "eos_token_id": 1,
    "bos_token_id": None,
    "pad_token_id": None,
}
VISION = {
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
    "initializer_range": 0.1,
}
TOKENS = {
    "image_token_id": 500,
    "video_token_id": 501,
    "vision_start_token_id": 502,
    "vision_end_token_id": 503,
    "tie_word_embeddings": False,
}
EXPERTS = {
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
FAMILIES = {
    "dense": ("Qwen3_5", {"intermediate_size": 128}),
    "moe": ("Qwen3_5Moe", EXPERTS),
}
STEPS = 30


def randomise(model: Any) -> None:
    """What the library initialises with zeros or ones would hide a mistake."""
    torch.manual_seed(7)
    for name, value in model.named_parameters():
        if name.endswith("linear_attn.norm.weight"):
            value.data = 1 + 0.1 * torch.randn_like(value)
        elif name.endswith("norm.weight"):
            value.data = 0.1 * torch.randn_like(value)
        elif name.endswith("dt_bias"):
            value.data = torch.randn_like(value)
        elif name.endswith("A_log"):
            value.data = torch.empty_like(value).uniform_(0.05, 4.05).log()
        elif "conv1d" in name:
            value.data = 0.5 * torch.randn_like(value)


@pytest.fixture(params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Any]:
    family, extra = FAMILIES[request.param]
    config_class = getattr(transformers, f"{family}Config")
    model_class = getattr(transformers, f"{family}ForConditionalGeneration")
    config = config_class(text_config={**TEXT, **extra}, vision_config=VISION, **TOKENS)
    model = model_class(config).to(torch.float32).eval()
    randomise(model)
    # save_pretrained would split the experts; published files have them fused.
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    written = json.loads(config.to_json_string(use_diff=False))
    (tmp_path / "config.json").write_text(json.dumps(written))
    return tmp_path, model


def expected(model: Any, prompt: list[int]) -> list[int]:
    text = list(prompt)
    with torch.inference_mode():
        for _ in range(STEPS):
            text.append(int(model(input_ids=torch.tensor([text])).logits[0, -1].argmax()))
    return text[len(prompt) :]


@pytest.mark.slow
def test_qwen3_5_greedy_tokens(checkpoint: tuple[Path, Any]) -> None:
    path, model = checkpoint
    rng = np.random.default_rng(3)
    shared = rng.integers(2, 480, 40).tolist()
    prompts = [shared, shared + rng.integers(2, 480, 5).tolist(), rng.integers(2, 480, 9).tolist()]
    wanted = [expected(model, prompt) for prompt in prompts]
    params = SamplingParams(max_tokens=STEPS, temperature=0.0, ignore_eos=True)
    with running(path, page_size=16, max_step_tokens=32, kv_dtype=None) as (engine, info):
        assert complete(engine, prompts, params) == wanted
        before = engine.stats().cached_tokens
        assert complete(engine, prompts, params) == wanted
        assert engine.stats().cached_tokens > before, "no state was restored"
        kinds = {group.kind.value for group in info.groups}
        assert kinds == {"full", "recurrent"}
