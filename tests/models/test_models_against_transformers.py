"""Contract: every family computes transformers' logits from the directory that it saves.

Oracle: tiny random models of `transformers`, float32, whole prompts of 40 tokens (longer than every
window and than the original length of every rope scaling), norm weights and biases randomised.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from reference_kernels import reference_table
from run_model import load, logits
from tiny_models import LINEAR, LLAMA3, TINY, YARN, Tiny, expected_logits, gemma3_multimodal, save
from tiny_models import prompt as tokens

from sixfold.common.checkpoint.checkpoint import open_checkpoint
from sixfold.models.loading import build_model, kernel_problems
from sixfold.platforms.interface_kernels import KernelTable


@pytest.mark.parametrize("name", sorted(TINY))
def test_logits_equal_transformers(name: str, tmp_path: Path, table: KernelTable) -> None:
    oracle = TINY[name].model()
    model = load(save(oracle, tmp_path), table)
    token_ids = tokens()
    expected = expected_logits(oracle, token_ids)
    assert expected.std() > 0.3  # a flat model would prove nothing
    torch.testing.assert_close(logits(model, token_ids), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mistral_window", "qwen3_moe", "gemma3"])
def test_pieces_of_a_prompt_equal_the_whole(name: str, tmp_path: Path) -> None:
    oracle = TINY[name].model()
    model = load(save(oracle, tmp_path))
    token_ids = tokens()
    pieces = logits(model, token_ids, [17, 1, 1, 9, 1, 11])
    torch.testing.assert_close(pieces, expected_logits(oracle, token_ids), atol=1e-4, rtol=1e-4)


def test_multimodal_gemma_serves_its_text_part(tmp_path: Path) -> None:
    oracle = gemma3_multimodal()
    path = save(oracle, tmp_path)
    checkpoint = open_checkpoint(path)
    assert checkpoint.architecture == "gemma3_text"
    token_ids = tokens()
    expected = expected_logits(oracle, token_ids)
    torch.testing.assert_close(logits(load(path), token_ids), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("new", "old"),
    [
        (LINEAR, {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 10000.0}),
        (LLAMA3, {"rope_scaling": {**LLAMA3, "rope_theta": None}, "rope_theta": 500000.0}),
        (YARN, {"rope_scaling": {**YARN, "rope_theta": None}, "rope_theta": 10000.0}),
    ],
    ids=["linear", "llama3", "yarn"],
)
def test_old_rope_fields_mean_the_same(new: dict, old: dict, tmp_path: Path) -> None:
    """rope_theta and rope_scaling at the top level, as written before transformers 5."""
    oracle = Tiny("Llama", {"rope_parameters": new}).model()
    path = save(oracle, tmp_path)
    config = json.loads((path / "config.json").read_text())
    del config["rope_parameters"]
    (path / "config.json").write_text(json.dumps(config | old))
    token_ids = tokens()
    expected = expected_logits(oracle, token_ids)
    torch.testing.assert_close(logits(load(path), token_ids), expected, atol=1e-4, rtol=1e-4)


def test_every_rope_scaling_changes_the_answer(tmp_path: Path) -> None:
    """The comparison above could not pass with a scaling left out."""
    token_ids = tokens()
    plain = expected_logits(TINY["llama"].model(), token_ids)
    for name in ("llama_linear", "llama_llama3", "llama_yarn", "llama_yarn_mscale"):
        scaled = expected_logits(TINY[name].model(), token_ids)
        assert (scaled - plain).abs().max() > 0.1, name


def test_old_gemma_fields_mean_the_same(tmp_path: Path) -> None:
    """The hub's form: sliding_window_pattern, rope_local_base_freq, rope_scaling (full layers)."""
    oracle = TINY["gemma3_linear"].model()
    path = save(oracle, tmp_path)
    config = json.loads((path / "config.json").read_text())
    for key in ("rope_parameters", "layer_types", "tie_word_embeddings", "hidden_activation"):
        config.pop(key, None)
    config |= {
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window_pattern": 6,
    }
    (path / "config.json").write_text(json.dumps(config))
    token_ids = tokens()
    expected = expected_logits(oracle, token_ids)
    torch.testing.assert_close(logits(load(path), token_ids), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_bfloat16_stays_near_float32(name: str, tmp_path: Path, table: KernelTable) -> None:
    oracle = TINY[name].model()
    model = load(save(oracle, tmp_path), table, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} <= {torch.bfloat16, torch.float32}
    token_ids = tokens()
    expected = expected_logits(oracle, token_ids)
    found = logits(model, token_ids)
    assert found.dtype == torch.float32
    assert (found - expected).abs().mean() < 0.05 * expected.std()


@pytest.mark.parametrize("name", sorted(TINY))
def test_problems_name_exactly_the_ops_called(name: str, tmp_path: Path) -> None:
    """`kernel_problems` is what kernels are chosen by: nothing missing, nothing invented."""
    path = save(TINY[name].model(), tmp_path)
    called: set[str] = set()

    class Recorder:
        kernels = reference_table().kernels  # what a layer asks when it prepares its weights

        def __getattr__(self, op: str):
            called.add(op)
            return getattr(reference_table(), op)

    logits(load(path, Recorder()), tokens(4))  # type: ignore[arg-type]
    problems = kernel_problems(open_checkpoint(path), "bfloat16")
    assert {p.op for p in problems} == called
    assert {p.dtype for p in problems} == {"bfloat16"}
    linears = {(p.dims["k"], p.dims["n"]) for p in problems if p.op == "linear"}
    assert (64 if name != "llama_one_kv_head" else 48, 256) in linears  # the head, tied or not


def test_cache_needs_follow_the_windows(tmp_path: Path) -> None:
    path = save(TINY["gemma3"].model(), tmp_path)
    model = build_model(open_checkpoint(path), reference_table(), torch.float32)
    assert [need.window for need in model.cache_needs()] == [8, 8, 8, 8, 8, 0, 8]
    assert {spec.scale for spec in model.attention_specs()} == {24**-0.5}
