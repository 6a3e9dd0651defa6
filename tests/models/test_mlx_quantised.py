"""Contract: quantised checkpoints load as they are on the MLX platform and give mlx-lm's tokens;
GGUF blocks with one scale for 32 numbers become MLX's affine form without changing a number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, quantize_model
from support.run_mlx import GREEDY, complete, running
from support.tiny_mlx import CONFIGS, VOCAB, build, greedy_of, own_greedy, write

from sixfold.common.checkpoint.checkpoint import open_checkpoint
from sixfold.common.checkpoint.gguf_weights import GGUFWeights
from sixfold.common.checkpoint.source import resolve_model
from sixfold.common.errors import ConfigError
from sixfold.platforms.mlx.gguf import OFFSETS, load_gguf

FORMS = {
    "4bit": {"group_size": 32, "bits": 4, "mode": "affine"},
    "8bit": {"group_size": 32, "bits": 8, "mode": "affine"},
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
}
WIDE = {"hidden_size": 64, "intermediate_size": 128}


def write_quantised(folder: Path, name: str, form: dict[str, Any]) -> Path:
    """A directory in the form of mlx-community's: packed weights, and how in config.json."""
    folder.mkdir()
    model = build(name, **WIDE)

    def fits(path: str, module: nn.Module) -> bool:
        return hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0

    nn.quantize(model, **form, class_predicate=fits)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    config = {"model_type": name, **CONFIGS[name], **WIDE, "quantization": form}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


MOST = {("mxfp4", "gpt_oss"), ("8bit", "qwen3_5_moe"), ("4bit", "deepseek_v3"), ("4bit", "llama")}
CASES = [
    pytest.param(form, name, marks=[] if (form, name) in MOST else [pytest.mark.wide])
    for form in FORMS
    for name in CONFIGS
]


@pytest.mark.parametrize(("form", "name"), CASES)
def test_a_quantised_directory_is_served_as_it_is(tmp_path: Path, form: str, name: str) -> None:
    path = write_quantised(tmp_path / "q", name, FORMS[form])
    rng = np.random.default_rng(2)
    asked = [rng.integers(0, VOCAB, length).tolist() for length in (3, 11, 20)]
    expected = own_greedy(path, asked, GREEDY.max_tokens or 0)
    with running(path) as (engine, info):
        assert complete(engine, asked) == expected
        (weights,) = [d for d in info.decisions if d.what == "weights"]
        assert weights.because == "kept as the checkpoint stores them"
        assert weights.chosen.startswith(FORMS[form]["mode"])
    with running(path, quantize="none") as (engine, info):
        assert len(complete(engine, asked)[0]) == 12
    with pytest.raises(ConfigError, match="already"), running(path, quantize="int8"):
        pass


def own_quantised(path: Path, asked: list[list[int]], bits: int) -> list[list[int]]:
    """mlx-lm's tokens of what its own conversion makes of the model."""
    model, config = load_model(path)
    quantize_model(model, config, 64, bits)
    return greedy_of(model, asked, GREEDY.max_tokens or 0)


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.wide)])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=[] if name in ("gpt_oss", "qwen3_5", "phi3") else [pytest.mark.wide]
        )
        for name in CONFIGS
    ],
)
def test_quantised_on_load_is_what_mlx_lm_converts_to(tmp_path: Path, name: str, bits: int) -> None:
    path = write(tmp_path / name, name, **WIDE)
    rng = np.random.default_rng(2)
    asked = [rng.integers(0, VOCAB, length).tolist() for length in (3, 11, 20)]
    with running(path, quantize=f"int{bits}") as (engine, info):
        assert complete(engine, asked) == own_quantised(path, asked, bits)
        said = {d.what: d.chosen for d in info.decisions}
    assert said["weights"] == f"{bits} bits, groups of 64"


def test_one_part_in_another_form(tmp_path: Path) -> None:
    """As mlx-community has GPT-OSS: experts in MXFP4, all else affine, the head left as it is."""
    path = tmp_path / "mixed"
    path.mkdir()
    model = build("gpt_oss", **WIDE)
    affine, experts = FORMS["8bit"], FORMS["mxfp4"]

    def form(name: str, module: nn.Module) -> bool | dict[str, Any]:
        if "lm_head" in name or not hasattr(module, "to_quantized"):
            return False
        return experts if "experts" in name else affine

    nn.quantize(model, **affine, class_predicate=form)
    mx.save_safetensors(str(path / "model.safetensors"), dict(tree_flatten(model.parameters())))
    named = {
        name: experts for name, m in model.named_modules() if getattr(m, "mode", "") == "mxfp4"
    }
    assert named
    config = {"model_type": "gpt_oss", **CONFIGS["gpt_oss"], **WIDE}
    config["quantization"] = {**affine, **named, "lm_head": False}
    (path / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(2)
    asked = [rng.integers(0, VOCAB, length).tolist() for length in (3, 11, 20)]
    with running(path) as (engine, _):
        assert complete(engine, asked) == own_greedy(path, asked, GREEDY.max_tokens or 0)


def test_gguf_blocks_are_kept_exactly() -> None:
    checkpoint = open_checkpoint(resolve_model(""))
    source = GGUFWeights(checkpoint.path)
    model, config = load_gguf(checkpoint, keep_blocks=True, dtype=mx.float16)
    assert config["quantization"]["group_size"] == 32
    modules = dict(model.named_modules())
    kept = [name for name in source.names() if source.scheme(name) in OFFSETS]
    assert len(kept) > 100
    for name in kept[:: len(kept) // 12]:
        module = modules[name.removesuffix(".weight")]
        found = mx.dequantize(
            module.weight,
            module.scales.astype(mx.float32),
            module.biases.astype(mx.float32),
            module.group_size,
            module.bits,
        )
        rows = source.shape(name)[0]
        np.testing.assert_array_equal(np.array(found), source.read_rows(name, 0, rows), name)
