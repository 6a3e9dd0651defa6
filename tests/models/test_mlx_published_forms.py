"""Contract: a directory as `transformers` 5 writes it, or as it is published, gives transformers'
log-probabilities on the MLX platform, or is refused with the field that mlx-lm's model file does
not read. What tokens equal to mlx-lm's own cannot show: that both read the configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import tiny_experts
from support.run_engine import check_logprobs, one_thread
from support.run_mlx import mlx_executor, running
from support.tiny_models import GEMMA3, TINY, Tiny, expected_logits, gemma3_multimodal, prompt, save

from sixfold.common.errors import CheckpointError, ConfigError

PROMPT = prompt(40)
HYBRID: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layers_block_type": ["mamba", "mamba", "attention", "mamba"],
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "shared_intermediate_size": 32,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "position_embedding_type": "nope",
}
SCALES = {
    "embedding_multiplier": 2.0,
    "attention_multiplier": 0.3,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
}
HALF = {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TURNS = ["sliding_attention", "full_attention"]
MORE = {
    "phi3": Tiny("Phi3", {**IDS, "sliding_window": None}),
    "phi3_half_rotated": Tiny("Phi3", {**IDS, "sliding_window": None, "rope_parameters": HALF}),
    "smollm3": Tiny("SmolLM3", {**IDS, "num_hidden_layers": 5, "no_rope_layer_interval": 4}),
    "granite": Tiny("Granite", SCALES),
    "granite_hybrid": Tiny("GraniteMoeHybrid", {**SCALES, **HYBRID}),
    "gemma3_other_layers": Tiny("Gemma3", {**GEMMA3, "layer_types": [*3 * TURNS, TURNS[0]]}),
}  # fmt: skip
EVERY = {**TINY, **MORE}
WINDOWS = {"mistral_window": 3, "qwen2_window": 2, "qwen3_window": 1}
"""Families whose files of mlx-lm keep no window -> how many layers should have one."""
REFUSED = {*WINDOWS, "gemma3_logit_cap"}
AT_EVERY_PUSH = (
    "llama_llama3", "mistral_no_window", "qwen2", "qwen3", "qwen3_moe_some_dense", "gemma3_linear",
)  # fmt: skip
CASES = [
    pytest.param(name, marks=[] if name in (*AT_EVERY_PUSH, *MORE) else [pytest.mark.wide])
    for name in sorted(EVERY.keys() - REFUSED)
]


def check(path: Path, oracle: Any, **fields: Any) -> None:
    with one_thread():
        expected = expected_logits(oracle, PROMPT)
        assert expected.std() > 0.05  # a flat model would prove nothing
        fields = {"page_size": 16, "max_step_tokens": 16, **fields}
        check_logprobs(mlx_executor(path, **fields), expected, PROMPT.tolist())


@pytest.mark.parametrize("name", CASES)
def test_log_probabilities_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    oracle = EVERY[name].model()
    check(save(oracle, tmp_path), oracle)


def test_multimodal_gemma_serves_its_text_part(tmp_path: Path) -> None:
    oracle = gemma3_multimodal()
    check(save(oracle, tmp_path), oracle)


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v3_yarn"])
def test_latent_attention(name: str, tmp_path: Path) -> None:
    oracle = tiny_experts.build(name)
    check(save(oracle, tmp_path), oracle)


def rewrite(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_published_mxfp4_stacks_of_experts(tmp_path: Path) -> None:
    """GPT-OSS as published, but for the angles, of which mlx-lm's file reads less."""
    oracle = tiny_experts.build("gpt_oss")
    rope = {"rope_type": "default", "rope_theta": 1e4}
    oracle.config.rope_parameters = rope
    whole = tiny_experts.save(oracle, tmp_path / "whole")
    path = tmp_path / "packed"
    path.mkdir()
    tiny_experts.write_mxfp4(whole, path, oracle)
    plain = type(oracle)(oracle.config).eval()
    plain.load_state_dict(oracle.state_dict())
    check(path, plain)
    rewrite(path, rope_parameters={**rope, **tiny_experts.YARN, "factor": 8.0, "truncate": False})
    with running(path) as (_, info):
        said = {d.what: d for d in info.decisions}
    assert "truncate" in said["rotary angles"].because
    assert said["weights"].chosen == "mxfp4 4 bits, groups of 32"


# ---- what is not read


@pytest.mark.parametrize("name", WINDOWS)
def test_a_window_that_is_not_kept_bounds_the_context(name: str, tmp_path: Path) -> None:
    oracle = EVERY[name].model()
    path, layers = save(oracle, tmp_path), WINDOWS[name]
    with running(path, max_context=None) as (_, info):
        assert info.max_context == 8
        (said,) = [d for d in info.decisions if d.what == "context"]
        assert said.chosen == "8 of 128 tokens"
        assert f"{layers} layers with a window of 8 tokens" in said.because
    short = PROMPT[:7]
    expected = expected_logits(oracle, short)
    check_logprobs(mlx_executor(path, max_context=8), expected, short.tolist())
    with pytest.raises(ConfigError, match=r"max_context 9: .* Choose at most 8\."):
        mlx_executor(path, max_context=9).load()


def test_a_cap_that_is_not_read_is_refused(tmp_path: Path) -> None:
    path = save(EVERY["gemma3_logit_cap"].model(), tmp_path)
    with pytest.raises(CheckpointError, match=r"'final_logit_softcapping' is 5\.0"):
        mlx_executor(path).load()
    rewrite(path, final_logit_softcapping=None)
    with running(path):
        pass


def test_layers_that_the_file_cannot_order_so_are_refused(tmp_path: Path) -> None:
    path = save(EVERY["gemma3"].model(), tmp_path)
    rewrite(path, layer_types=[TURNS[1], *TURNS[:1] * 6], sliding_window=8)
    with pytest.raises(CheckpointError, match=r"layers\.0 attends within 8 tokens"):
        mlx_executor(path).load()
