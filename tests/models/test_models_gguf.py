"""Contract: a GGUF file gives the same model as the weights that it was written from.

Oracles: files written by the `gguf` package from tiny transformers models; their own logits; the
package's quantise / dequantise for every type that it can write; llama.cpp's layout rules (permuted
q and k for llama, 1 + w norms for Gemma).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from run_model import load, logits
from tiny_gguf import dequantised, stored_values, write_model
from tiny_models import GEMMA3, LINEAR, LLAMA3, TINY, YARN, Tiny, expected_logits
from tiny_models import prompt as tokens

from sixfold.common.checkpoint.checkpoint import open_checkpoint
from sixfold.platforms.interface_kernels import KernelTable

# GGUF's Gemma has a fixed query scale: the head size (256 in all sizes but one).
GGUF_GEMMA = Tiny("Gemma3", {**GEMMA3, "query_pre_attn_scalar": 32})
CASES = {
    "llama": ("llama", TINY["llama"]),
    "llama_tied": ("llama", TINY["llama_tied_own_head_dim"]),
    "llama_biases": ("llama", Tiny("Llama", {"attention_bias": True})),
    "llama_linear": ("llama", Tiny("Llama", {"rope_parameters": LINEAR})),
    "llama_yarn": ("llama", Tiny("Llama", {"rope_parameters": YARN})),
    "qwen2": ("qwen2", TINY["qwen2"]),
    "qwen3": ("qwen3", TINY["qwen3"]),
    "gemma3": ("gemma3", GGUF_GEMMA),
}
WRITABLE = [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1]


def state_of(oracle: Any) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in oracle.state_dict().items()}


@pytest.mark.parametrize("name", sorted(CASES))
def test_logits_equal_transformers(name: str, tmp_path: Path, table: KernelTable) -> None:
    arch, tiny = CASES[name]
    oracle = tiny.model()
    path = write_model(tmp_path / "m.gguf", arch, oracle.config, state_of(oracle))
    token_ids = tokens()
    expected = expected_logits(oracle, token_ids)
    found = logits(load(path, table), token_ids)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_llama3_frequency_factors(tmp_path: Path) -> None:
    """Llama 3.1's rescaling is a tensor of divisors in GGUF."""
    oracle = Tiny("Llama", {"rope_parameters": LLAMA3}).model()
    plain = 1.0 / (500000.0 ** (torch.arange(0, 16, 2) / 16))
    factors = (plain / oracle.model.rotary_emb.inv_freq).numpy().astype(np.float32)
    assert factors.min() < 2.0
    assert factors.max() == 8.0
    extra = {"rope_freqs.weight": factors}
    path = write_model(tmp_path / "m.gguf", "llama", oracle.config, state_of(oracle), extra=extra)
    token_ids = tokens()
    expected = expected_logits(oracle, token_ids)
    torch.testing.assert_close(logits(load(path), token_ids), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", WRITABLE, ids=lambda kind: kind.name)
@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_every_tensor_equals_the_dequantised_original(
    arch: str, kind: Kind, tmp_path: Path
) -> None:
    oracle = CASES[arch][1].model()
    state = state_of(oracle)
    model = load(write_model(tmp_path / "m.gguf", arch, oracle.config, state, kind))
    seen = 0
    for name, parameter in model.named_parameters():
        values = state[name]
        expected = values
        if values.ndim == 1 and arch == "gemma3":
            expected = stored_values(name, values, arch, oracle.config)  # the model uses 1 + w
        elif values.ndim == 2:
            expected = dequantised(values, kind)  # rows are permuted whole: blocks stay blocks
        assert np.array_equal(parameter.numpy(), expected), name
        seen += 1
    assert seen == len([n for n in state if n != "lm_head.weight" or not model.args.tied])


def test_bfloat16_weights_are_the_rounded_originals(tmp_path: Path) -> None:
    oracle = CASES["llama"][1].model()
    path = write_model(tmp_path / "m.gguf", "llama", oracle.config, state_of(oracle), Kind.Q8_0)
    wide, narrow = load(path), load(path, dtype=torch.bfloat16)
    for (name, a), (_, b) in zip(wide.named_parameters(), narrow.named_parameters(), strict=True):
        assert torch.equal(a.to(torch.bfloat16), b), name


def test_gemma_norms_keep_float32_beside_bfloat16(tmp_path: Path) -> None:
    oracle = GGUF_GEMMA.model()
    path = write_model(tmp_path / "m.gguf", "gemma3", oracle.config, state_of(oracle))
    model = load(path, dtype=torch.bfloat16)
    expected = oracle.state_dict()["model.norm.weight"] + 1
    assert torch.equal(model.model.norm.weight, expected)


def test_metadata_becomes_a_configuration(tmp_path: Path) -> None:
    oracle = GGUF_GEMMA.model()
    path = write_model(tmp_path / "tiny.gguf", "gemma3", oracle.config, state_of(oracle))
    checkpoint = open_checkpoint(path)
    assert checkpoint.format == "gguf"
    assert checkpoint.name == "tiny"
    assert checkpoint.architecture == "gemma3_text"
    assert checkpoint.vocab_size == 256
    assert checkpoint.context_length == 128
    config = oracle.config
    for key in ("hidden_size", "head_dim", "layer_types", "sliding_window", "tie_word_embeddings"):
        assert checkpoint.config[key] == getattr(config, key), key
    assert checkpoint.config["rope_parameters"] == config.rope_parameters
