"""Contract: a checkpoint that cannot be served is refused with one sentence that names the file,
the tensor or field, and what is supported. Each test breaks a good tiny checkpoint in one place.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_model import load
from safetensors.torch import load_file, save_file
from tiny_gguf import write_model
from tiny_models import GEMMA3, TINY, Tiny, save

from sixfold.common.checkpoint.checkpoint import open_checkpoint
from sixfold.common.errors import CheckpointError
from sixfold.models.loading import kernel_problems

Weights = dict[str, torch.Tensor]
QUERY = "model.layers.1.self_attn.q_proj.weight"


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(path)
    text = str(caught.value)
    assert text.endswith("."), text
    assert "\n" not in text
    return text


def broken_weights(path: Path, change: Callable[[Weights], object], family: str = "llama") -> str:
    save(TINY[family].model(), path)
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return refusal(path)


def broken_config(path: Path, changes: dict[str, Any], family: str = "llama") -> str:
    save(TINY[family].model(), path)
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(config))
    text = refusal(path)
    assert "config.json" in text or "tensor" in text
    return text


def test_missing_tensor(tmp_path: Path) -> None:
    text = broken_weights(tmp_path, lambda w: w.pop(QUERY))
    assert QUERY in text
    assert "missing" in text


def test_missing_expert(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.3.up_proj.weight"
    text = broken_weights(tmp_path, lambda w: w.pop(name), "qwen3_moe")
    assert "model.layers.0.mlp.experts.gate_up_proj" in text


def test_expert_that_the_configuration_does_not_have(tmp_path: Path) -> None:
    text = broken_config(tmp_path, {"num_experts": 5, "num_local_experts": 5}, "qwen3_moe")
    assert "experts.5." in text or "mlp.gate.weight" in text


def test_missing_head_when_it_is_not_tied(tmp_path: Path) -> None:
    assert "lm_head.weight" in broken_weights(tmp_path, lambda w: w.pop("lm_head.weight"))


def test_wrong_shape_names_both_shapes(tmp_path: Path) -> None:
    def shrink(weights: Weights) -> None:
        weights[QUERY] = weights[QUERY][:10].clone()

    text = broken_weights(tmp_path, shrink)
    assert QUERY in text
    assert "model.safetensors" in text
    assert "(10, 64)" in text
    assert "(64, 64)" in text
    assert "config.json" in text


def test_tensor_that_the_architecture_lacks(tmp_path: Path) -> None:
    name = QUERY.replace("weight", "bias")
    text = broken_weights(tmp_path, lambda w: w.update({name: torch.zeros(64)}))
    assert name in text
    assert "llama" in text


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float64])
def test_unsupported_storage_type(dtype: torch.dtype, tmp_path: Path) -> None:
    text = broken_weights(tmp_path, lambda w: w.update({QUERY: w[QUERY].to(dtype)}))
    assert QUERY in text
    assert "F32 F16 BF16" in text


def test_known_leftovers_are_no_reason_to_refuse(tmp_path: Path) -> None:
    """Old files hold the rotary frequencies; tied files sometimes hold the head too."""
    save(TINY["llama_tied_own_head_dim"].model(), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(12)
    weights["lm_head.weight"] = torch.zeros(256, 64)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    load(tmp_path)


def test_unknown_architecture_lists_the_supported(tmp_path: Path) -> None:
    text = broken_config(tmp_path, {"model_type": "mamba"})
    assert "'mamba'" in text
    for name in ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma3_text"):
        assert name in text
    with pytest.raises(CheckpointError, match="'mamba'"):
        kernel_problems(open_checkpoint(tmp_path), "float32")


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "proportional"])
def test_unsupported_rope_type(kind: str, tmp_path: Path) -> None:
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    text = broken_config(tmp_path, {"rope_parameters": rope})
    assert repr(kind) in text
    assert "default linear llama3 yarn" in text


@pytest.mark.parametrize(
    ("family", "changes", "field"),
    [
        ("llama", {"hidden_size": None}, "hidden_size"),
        ("llama", {"num_hidden_layers": None}, "num_hidden_layers"),
        ("llama", {"num_attention_heads": "four"}, "num_attention_heads"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads"),
        ("llama", {"num_key_value_heads": 0}, "num_key_value_heads"),
        ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama", {"rope_parameters": "yarn"}, "rope_parameters"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor"),
        ("qwen2_window", {"layer_types": ["full_attention", "chunked", "full_attention"]}, "layer"),
        ("qwen3_moe", {"moe_intermediate_size": True}, "moe_intermediate_size"),
        ("gemma3", {"hidden_activation": "gelu"}, "hidden_activation"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ],
)
def test_fields_are_named(family: str, changes: dict[str, Any], field: str, tmp_path: Path) -> None:
    assert field in broken_config(tmp_path, changes, family)


def test_gguf_missing_tensor(tmp_path: Path) -> None:
    oracle = TINY["llama"].model()
    state = {name: tensor.numpy() for name, tensor in oracle.state_dict().items()}
    path = write_model(tmp_path / "m.gguf", "llama", oracle.config, state, leave_out=[QUERY])
    text = refusal(path)
    assert str(path) in text
    assert QUERY in text


def test_gguf_unknown_tensor(tmp_path: Path) -> None:
    oracle = Tiny("Gemma3", GEMMA3).model()
    state = {name: tensor.numpy() for name, tensor in oracle.state_dict().items()}
    extra = {"blk.0.ssm_in.weight": state["model.norm.weight"]}
    path = write_model(tmp_path / "m.gguf", "gemma3", oracle.config, state, extra=extra)
    assert "blk.0.ssm_in.weight" in refusal(path)


def test_gguf_wrong_number_of_frequency_factors(tmp_path: Path) -> None:
    oracle = TINY["llama"].model()
    state = {name: tensor.numpy() for name, tensor in oracle.state_dict().items()}
    extra = {"rope_freqs.weight": state["model.norm.weight"]}
    path = write_model(tmp_path / "m.gguf", "llama", oracle.config, state, extra=extra)
    assert "rope_freqs.weight" in refusal(path)
