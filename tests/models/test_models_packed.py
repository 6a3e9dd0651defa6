"""Contract: GPTQ, AWQ and compressed-tensors directories are served in the precision that they
have. Converted on load, a model equals transformers on the dequantised weights; kept, it differs by
the rounding of activations alone; a zero that is off by one would be seen; what is kept is decided.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_kernels import reference_table
from run_model import load, load_native, load_on_cpu, logits
from safetensors.torch import load_file, save_file
from support.kernel_checks import rounded_to_bytes
from tiny_models import TINY, expected_logits
from tiny_models import prompt as tokens
from tiny_packed import (
    Form,
    awq,
    compressed,
    describe,
    described,
    gptq,
    write_packed_model,
)

from sixfold.common.checkpoint.checkpoint import open_checkpoint
from sixfold.common.errors import CheckpointError
from sixfold.models.loading import kernel_problems
from sixfold.platforms.cpu.native_library import missing
from sixfold.platforms.interface_kernels import KernelTable

native = pytest.mark.skipif(missing() is not None, reason="no native kernels here")

# Zeros near the middle, as in trained models: a common offset would drown everything else.
NEAR: dict[str, Any] = {"spread": 2}
FORMS: dict[str, Form] = {
    "gptq-int4": gptq("gptq", 4, 32, **NEAR),
    "gptq-int4-sym": gptq("gptq", 4, 64, symmetric=True),
    "gptq-int4-reordered": gptq("gptq", 4, 32, reordered=True, **NEAR),
    "gptq-int8": gptq("gptq", 8, -1, symmetric=True),
    "gptq_v2-int4": gptq("gptq_v2", 4, 32, **NEAR),
    "awq": awq(32, **NEAR),
    "bytes": compressed(False, 8, -1),
    "packed-int4": compressed(True, 4, 32, symmetric=False, scale_type=torch.bfloat16, **NEAR),
}
SCHEME = {
    "gptq-int8": "gptq_int8",
    "awq": "awq_int4",
    "bytes": "int8_token",
    "packed-int4": "packed_int4",
}
TOLERANCE = 0.06
"""Relative, of all logits: what eight-bit activations cost these models (seen: 0.017 to 0.035)."""


def relative(found: torch.Tensor, want: torch.Tensor) -> float:
    return float((found - want).norm() / want.norm())


def rounding_table() -> KernelTable:
    """The reference kernels, but products of a layer's matrices round their input as the native
    ones do. The head, which stays in floats, is told by its 256 outputs."""
    table = reference_table()
    plain = table.kernels["linear"].fn

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return plain(x if len(weight) == 256 else rounded_to_bytes(x), weight, bias)

    rounding = replace(table.kernels["linear"], fn=linear)
    return KernelTable({**table.kernels, "linear": rounding}, ())


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_converted_on_load(name: str, family: str, tmp_path: Path) -> None:
    oracle = write_packed_model(tmp_path, TINY[family], FORMS[name])
    expected = expected_logits(oracle, tokens())
    torch.testing.assert_close(logits(load(tmp_path), tokens()), expected, atol=1e-4, rtol=1e-4)


@native
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_kept_as_stored(name: str, family: str, tmp_path: Path) -> None:
    oracle = write_packed_model(tmp_path, TINY[family], FORMS[name])
    problems = kernel_problems(open_checkpoint(tmp_path), "float32", "stored")
    scheme = SCHEME.get(name, "gptq_int4")
    assert {p.weights for p in problems} == {"", "float16", scheme}
    model = load_native(tmp_path)
    assert not [n for n, p in model.named_parameters() if p.dim() == 2], "a dequantised copy"
    found, expected = logits(model, tokens()), expected_logits(oracle, tokens())
    assert 0 < relative(found, expected) < TOLERANCE
    if FORMS[name].symmetric:
        # No minimum is rounded: with activations rounded alike, only sums differ in their order (a
        # number that then falls on the other side of a half costs up to 0.008).
        like_the_kernel = logits(load(tmp_path, rounding_table()), tokens())
        assert relative(found, like_the_kernel) < 0.01


@native
@pytest.mark.parametrize(("name", "other"), [("gptq-int4", "gptq_v2"), ("gptq_v2-int4", "gptq")])
def test_a_zero_that_is_off_by_one_would_be_seen(name: str, other: str, tmp_path: Path) -> None:
    oracle = write_packed_model(tmp_path, TINY["llama"], FORMS[name])
    change(tmp_path, checkpoint_format=other)
    error = relative(logits(load_native(tmp_path), tokens()), expected_logits(oracle, tokens()))
    assert error > 5 * TOLERANCE


@native
def test_awq_nibbles_in_another_order_would_be_seen(tmp_path: Path) -> None:
    oracle = write_packed_model(tmp_path, TINY["llama"], FORMS["awq"])
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.qweight"
    weights[name] = torch.stack((weights[name] & 15, weights[name] & ~15)).sum(0).int().roll(1, 1)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    error = relative(logits(load_native(tmp_path), tokens()), expected_logits(oracle, tokens()))
    assert error > 5 * TOLERANCE


def test_a_directory_that_is_described_by_a_file_of_its_own(tmp_path: Path) -> None:
    """As msModelSlim writes it: no quantization_config, files of another name."""
    oracle = write_packed_model(tmp_path, TINY["qwen2"], described())
    describe(tmp_path)
    problems = kernel_problems(open_checkpoint(tmp_path), "float32", "stored")
    assert {p.weights for p in problems} == {"", "float16", "int8_token"}
    expected = expected_logits(oracle, tokens())
    torch.testing.assert_close(logits(load(tmp_path), tokens()), expected, atol=1e-4, rtol=1e-4)


def test_described_offsets_that_are_not_zero_are_refused(tmp_path: Path) -> None:
    write_packed_model(tmp_path, TINY["llama"], described())
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.0.mlp.up_proj.weight_offset"][5] = 1.0
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj\.weight' has offsets .* not zero"):
        load(tmp_path)


@native
def test_what_becomes_of_activations_is_decided(tmp_path: Path) -> None:
    write_packed_model(tmp_path, TINY["llama"], FORMS["bytes"])
    decisions = {d.what: d for d in load_on_cpu(tmp_path).decisions}
    assert decisions["weights"].chosen == "float16, int8_token"
    told = decisions["activations of linear"]
    assert told.chosen == "int8, a scale per 32 numbers"
    assert told.because == "the checkpoint asks for int8, a scale per token; 'native' rounds less"


def change(path: Path, **fields: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] |= fields
    (path / "config.json").write_text(json.dumps(config))


@native
def test_modules_that_were_left_out_stay_in_floats(tmp_path: Path) -> None:
    """As with modules_to_not_convert: the file has a plain weight there."""
    oracle = write_packed_model(tmp_path, TINY["llama"], FORMS["awq"])
    weights = load_file(tmp_path / "model.safetensors")
    module = "model.layers.1.mlp.down_proj"
    for last in ("qweight", "qzeros", "scales"):
        del weights[f"{module}.{last}"]
    weights[f"{module}.weight"] = oracle.state_dict()[f"{module}.weight"].half()
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    change(tmp_path, modules_to_not_convert=["model.layers.1.mlp.down_proj"])
    model = load_native(tmp_path)
    assert model.model.layers[1].mlp.down_proj.scheme == "float16"
    assert model.model.layers[1].mlp.up_proj.scheme == "awq_int4"
    assert relative(logits(model, tokens()), expected_logits(oracle, tokens())) < TOLERANCE


def test_biases_of_zeros_that_packers_add_are_left_out(tmp_path: Path) -> None:
    oracle = write_packed_model(tmp_path, TINY["llama"], FORMS["gptq-int4"])
    file = tmp_path / "model.safetensors"
    weights, name = load_file(file), "model.layers.0.mlp.up_proj.bias"
    weights[name] = torch.zeros(96, dtype=torch.float16)
    save_file(weights, file, {"format": "pt"})
    expected = expected_logits(oracle, tokens())
    torch.testing.assert_close(logits(load(tmp_path), tokens()), expected, atol=1e-4, rtol=1e-4)
    weights[name][3] = 0.5
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj\.bias.*not part of the architecture"):
        load(tmp_path)


def test_a_matrix_of_another_size_is_refused(tmp_path: Path) -> None:
    write_packed_model(tmp_path, TINY["llama"], FORMS["gptq-int4"])
    config = json.loads((tmp_path / "config.json").read_text()) | {"intermediate_size": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"_proj\.qweight' has shape \(\d+, \d+\)"):
        load(tmp_path)


@native
@pytest.mark.parametrize(
    ("fields", "chosen", "because"),
    [
        ({}, "float16, gptq_int4", "kept as the checkpoint stores them"),
        ({"quantize": "none"}, "float32", "set by the user; the checkpoint stores float16, gptq"),
        ({"quantize": "int8"}, "int8", "set by the user; the checkpoint stores float16, gptq_int4"),
        ({"dtype": "float32"}, "float32", "dtype was set by the user"),
        ({"kernels": {"linear": "generic"}}, "float32", "no kernel for float16, gptq_int4"),
    ],
)
def test_how_matrices_are_kept_is_decided(
    fields: dict[str, Any], chosen: str, because: str, tmp_path: Path
) -> None:
    oracle = write_packed_model(tmp_path, TINY["llama"], FORMS["gptq-int4"])
    loaded = load_on_cpu(tmp_path, **fields)
    decisions = {d.what: d for d in loaded.decisions}
    assert decisions["weights"].chosen == chosen
    assert because in decisions["weights"].because
    assert decisions["weights"].fallback == ("kernels" in fields)
    if "kernels" not in fields:
        assert decisions["step"].chosen == "recorded"
    ends = 2 * 256 * 64
    inner = sum(p.numel() for p in oracle.parameters()) - ends
    bits = {"int8": (8.5, 8.5), "float32": (32, 32)}.get(chosen, (5, 16))
    want = (inner * bits[0] + ends * bits[1]) / 8
    assert loaded.weight_bytes == pytest.approx(want, rel=0.05)


@native
def test_columns_out_of_order_cost_the_recording_and_the_decision_says_so(tmp_path: Path) -> None:
    write_packed_model(tmp_path, TINY["llama"], FORMS["gptq-int4-reordered"])
    decisions = {d.what: d for d in load_on_cpu(tmp_path).decisions}
    assert decisions["weights"].chosen == "float16, gptq_int4"
    assert decisions["step"].chosen == "op by op"
    assert "desc_act" in decisions["step"].because


@native
@pytest.mark.parametrize("name", ["gptq-int4", "awq"])
def test_packed_experts_are_kept_as_stored(name: str, tmp_path: Path) -> None:
    oracle = write_packed_model(tmp_path, TINY["qwen3_moe"], FORMS[name])
    expected = expected_logits(oracle, tokens())
    torch.testing.assert_close(logits(load(tmp_path), tokens()), expected, atol=1e-4, rtol=1e-4)
    model = load_native(tmp_path)
    assert not [n for n, p in model.named_parameters() if p.dim() > 1], "a dequantised copy"
    assert 0 < relative(logits(model, tokens()), expected) < TOLERANCE
    decisions = {d.what: d for d in load_on_cpu(tmp_path).decisions}
    assert decisions["kernel moe"].chosen == "native"
    kept = set(decisions["weights"].chosen.split(", "))
    assert kept == {"float16", SCHEME.get(name, "gptq_int4")}
    assert decisions["step"].chosen == "recorded"
