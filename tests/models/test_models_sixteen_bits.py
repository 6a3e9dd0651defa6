"""Contract: matrices that a checkpoint stores in sixteen bits are kept in them where the kernels
widen as they read, and the model computes what it computes on the float32 copies, bit for bit; how
they are kept is decided with a reason and counted in the memory that is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from run_model import load_native, load_on_cpu, logits
from safetensors.torch import load_file, save_file
from tiny_gguf import write_model
from tiny_models import TINY, expected_logits, save
from tiny_models import prompt as tokens

from sixfold.common.checkpoint.checkpoint import open_checkpoint
from sixfold.models.loading import kernel_problems
from sixfold.platforms.cpu.native_library import missing

pytestmark = pytest.mark.skipif(missing() is not None, reason="no native kernels here")

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def kept_types(model: Any) -> set[torch.dtype]:
    layers = [m for m in model.modules() if hasattr(m, "matrix") or hasattr(m, "table")]
    kept = [getattr(m, "matrix", None) or m.table for m in layers]
    return {getattr(matrix, "stack", matrix).data.dtype for matrix in kept}


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize(
    "name", ["llama", "llama_tied_own_head_dim", "qwen2", "gemma3", "qwen3_moe"]
)
def test_equal_to_the_float32_copies(name: str, half: str, tmp_path: Path) -> None:
    stored, oracle = TINY[name].model().to(HALVES[half]), TINY[name].model()
    path = save(stored, tmp_path)
    kept, widened = load_native(path), load_native(path, "")
    assert kept_types(kept) == {HALVES[half]}
    assert kept_types(widened) == {torch.float32}
    found = logits(kept, tokens())
    assert torch.equal(found, logits(widened, tokens()))
    # Not the stored model widened: its rotary frequencies are rounded too.
    values = {name: tensor.float() for name, tensor in stored.state_dict().items()}
    oracle.load_state_dict(values)
    expected = expected_logits(oracle, tokens())
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16])
def test_gguf_too(kind: Kind, tmp_path: Path) -> None:
    oracle = TINY["llama"].model()
    state = {name: tensor.numpy() for name, tensor in oracle.state_dict().items()}
    path = write_model(tmp_path / "m.gguf", "llama", oracle.config, state, kind)
    kept = load_native(path)
    assert kept_types(kept) == {torch.float16 if kind is Kind.F16 else torch.bfloat16}
    assert torch.equal(logits(kept, tokens()), logits(load_native(path, ""), tokens()))


def test_each_matrix_has_its_own_form(tmp_path: Path) -> None:
    """One matrix is stored in float32 and one in the other sixteen bits: neither is rounded."""
    path = save(TINY["llama"].model().bfloat16(), tmp_path)
    weights = load_file(path / "model.safetensors")
    wide, other = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("up", "down"))
    weights[wide] = weights[wide].float() * 1.0001
    weights[other] = weights[other].half() * 1.01
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    model = load_native(path)
    mlp = model.model.layers[0].mlp
    assert [m.scheme for m in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)] == [
        "bfloat16",
        "",
        "float16",
    ]
    assert torch.equal(logits(model, tokens()), logits(load_native(path, ""), tokens()))


@pytest.mark.parametrize(
    ("fields", "chosen", "because", "bits"),
    [
        ({}, "bfloat16", "kept as the checkpoint stores them, computed in float32", 16),
        ({"quantize": "none"}, "float32", "set by the user; the checkpoint stores bfloat16", 32),
        ({"quantize": "int8"}, "int8", "set by the user; the checkpoint stores bfloat16", 8.5),
        ({"dtype": "float32"}, "float32", "dtype was set by the user", 32),
        ({"dtype": "bfloat16"}, "bfloat16", "no narrower form", 16),
        ({"kernels": {"sample": "shortlist"}}, "bfloat16", "kept", 16),
        ({"kernels": {"linear": "generic"}}, "float32", "no kernel for bfloat16: matrices are", 32),
    ],
)
def test_how_they_are_kept_is_decided(
    fields: dict[str, Any], chosen: str, because: str, bits: float, tmp_path: Path
) -> None:
    oracle = TINY["llama"].model().bfloat16()
    loaded = load_on_cpu(save(oracle, tmp_path), **fields)
    decision = {d.what: d for d in loaded.decisions}["weights"]
    assert decision.chosen == chosen
    assert because in decision.because
    assert not decision.fallback
    numbers = sum(p.numel() for p in oracle.parameters())
    assert loaded.weight_bytes == pytest.approx(numbers * bits / 8, rel=0.05)
    kept = {d.what: d for d in loaded.decisions}["keys and values"].chosen
    assert (kept == "float16") == (chosen == "int8"), "exact weights do not lower the cache's dtype"
    assert loaded.dtype == fields.get("dtype", "float32")


def test_a_float32_checkpoint_has_nothing_to_keep(tmp_path: Path) -> None:
    loaded = load_on_cpu(save(TINY["llama"].model(), tmp_path))
    decision = {d.what: d for d in loaded.decisions}["weights"]
    assert (decision.chosen, decision.rejected) == ("float32", ())


def test_stacked_experts_are_kept_and_routers_are_never_rounded(tmp_path: Path) -> None:
    path = save(TINY["qwen3_moe"].model().bfloat16(), tmp_path)
    checkpoint = open_checkpoint(path)
    problems = kernel_problems(checkpoint, "float32", "stored")
    assert {p.weights for p in problems if p.op == "moe"} == {"bfloat16"}
    decisions = {d.what: d for d in load_on_cpu(path).decisions}
    assert decisions["weights"].chosen == "bfloat16"
    assert decisions["kernel moe"].chosen == "native"
    problems = kernel_problems(checkpoint, "float32", "int4")
    assert {p.weights for p in problems if p.op == "moe"} == {"int4"}
    router = TINY["qwen3_moe"].changes["num_experts"]
    assert {p.weights for p in problems if p.dims.get("n") == router} == {""}
