"""Contract: the text of Step-3.7-Flash computes transformers' logits from the published names, with
either form of its configuration, through the executor and the engine: in chunks, in batches, after
prefix hits and preemptions, with any page size; what would be another model is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from support.run_engine import (
    check_crowd,
    check_logprobs,
    check_prefix_hits,
    one_thread,
    torch_executor,
)
from support.tiny_qwen3_5 import greedy, logits
from support.tiny_step3p7 import NAMES, build, save

from sixfold.common.errors import CheckpointError

TEXT = 250  # ids below are text


@pytest.fixture(scope="module", autouse=True)
def _threads() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: Any) -> dict[str, tuple[Path, Any]]:
    found = {}
    for name in NAMES:
        model = build(name)
        found[name] = save(model, tmp_path_factory.mktemp("models") / name, name), model
    return found


def text(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, TEXT, length).tolist()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunk", [512, 9])
def test_prompt_logprobs_are_those_of_transformers(
    made: dict[str, tuple[Path, Any]], name: str, chunk: int
) -> None:
    path, oracle = made[name]
    prompt = text(100)
    expected = logits(oracle, prompt)
    assert expected.std() > 0.3
    check_logprobs(torch_executor(path, max_step_tokens=chunk), expected, prompt)


def test_the_files_have_the_published_names(made: dict[str, tuple[Path, Any]]) -> None:
    """Else the tests above would say nothing of published checkpoints."""
    names = set(load_file(made["published"][0] / "model.safetensors"))
    block = "model.layers.2."
    parts = ("gate.weight", "router_bias", "gate_proj.weight", "up_proj.weight", "down_proj.weight")
    assert {f"{block}moe.{part}" for part in parts} <= names
    assert {f"{block}share_expert.up_proj.weight", f"{block}self_attn.g_proj.weight"} <= names
    assert {"vit_large_projector.weight", "vision_model.conv1.weight"} <= names


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("limits", {"swiglu_limits": [0] * 6}),
        ("limits of the shared expert", {"swiglu_limits_shared": [0] * 6}),
        ("scaling", {"rope_scaling": None}),
        ("theta", {"rope_theta": 10000}),
        ("factor", {"moe_router_scaling_factor": 1.0}),
        ("window", {"sliding_window": 9}),
    ],
)
def test_every_field_counts(
    made: dict[str, tuple[Path, Any]], name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    """With one field changed the comparison fails: it would see each of them forgotten."""
    path, oracle = made["published"]
    prompt = text(100)
    executor = torch_executor(_changed(path, tmp_path / "model", changes))
    with pytest.raises(AssertionError, match="not close"):
        check_logprobs(executor, logits(oracle, prompt), prompt)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zero_centered": False}, "'zero_centered' has the value False.*supported: true"),
        ({"moe_router_activation": "softmax"}, "supported: sigmoid"),
        ({"rope_theta": [5e6, 1e4, 1e4, 2e4, 5e6, 1e4]}, "one value for all sliding_attention"),
        ({"swiglu_limits": [0, 0]}, "an entry for each of 5 layers"),
        ({"attention_other_setting": {"num_attention_heads": 5}}, "a multiple of the 2 key/value"),
        ({"attention_other_setting": {"head_dim": 8}}, "16, as on the other layers"),
        ({"moe_layers_enum": "2,x"}, "numbers of layers"),
        ({"mlp_layer_types": ["wide"] * 6}, "dense or sparse"),
    ],
)
def test_what_would_be_another_model_is_refused(
    made: dict[str, tuple[Path, Any]], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = _changed(made["published"][0], tmp_path / "model", changes)
    with pytest.raises(CheckpointError, match=message):
        torch_executor(path).load()


def _changed(path: Path, folder: Path, changes: dict[str, Any]) -> Path:
    shutil.copytree(path, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("page_size", [1, 16, 128])
def test_prefix_hits(made: dict[str, tuple[Path, Any]], page_size: int) -> None:
    path, oracle = made["published"]
    first = text(150)
    prompts = [first, first[:140] + text(20, 1), first]
    reused = [0, 140 // page_size * page_size, 149 // page_size * page_size]
    executor = torch_executor(path, page_size=page_size, max_context=256, max_step_tokens=64)
    check_prefix_hits(executor, prompts, reused, lambda *a: greedy(oracle, *a))


def test_a_crowd_gets_what_each_gets_alone(made: dict[str, tuple[Path, Any]]) -> None:
    path, oracle = made["published"]
    check_crowd(path, lambda *a: greedy(oracle, *a), TEXT)
