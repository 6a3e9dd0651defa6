"""Contract: DeepSeek-V3 (latent attention, grouped experts) and GPT-OSS (sinks, windows, clamped
experts with biases) compute transformers' logits through the executor and the engine: in chunks,
in batches, after prefix hits and preemptions, with any page size; GPT-OSS from MXFP4 stacks too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file
from support.run_engine import (
    check_crowd,
    check_logprobs,
    check_prefix_hits,
    one_thread,
    torch_executor,
)
from support.tiny_experts import MODELS, build, save, write_mxfp4
from support.tiny_qwen3_5 import greedy, logits

from sixfold.common.errors import CheckpointError

NAMES = tuple(MODELS)
WHOLE = ("deepseek_v3", "gpt_oss")


@pytest.fixture(scope="module", autouse=True)
def _threads() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: Any) -> dict[str, tuple[Path, Any]]:
    found = {}
    for name in NAMES:
        model = build(name)
        found[name] = save(model, tmp_path_factory.mktemp("models") / name), model
    return found


def text(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(2, 250, length).tolist()


@pytest.mark.parametrize(("name", "chunk"), [*((n, 512) for n in NAMES), *((n, 9) for n in WHOLE)])
def test_prompt_logprobs_are_those_of_transformers(
    made: dict[str, tuple[Path, Any]], name: str, chunk: int
) -> None:
    path, oracle = made[name]
    prompt = text(60)
    expected = logits(oracle, prompt)
    assert expected.std() > 0.3
    check_logprobs(torch_executor(path, max_step_tokens=chunk), expected, prompt)


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("page_size", [1, 16, 128])
def test_prefix_hits(made: dict[str, tuple[Path, Any]], name: str, page_size: int) -> None:
    path, oracle = made[name]
    first = text(150)
    prompts = [first, first[:140] + text(20, 1), first]
    reused = [0, 140 // page_size * page_size, 149 // page_size * page_size]
    executor = torch_executor(path, page_size=page_size, max_context=256, max_step_tokens=64)
    check_prefix_hits(executor, prompts, reused, lambda *a: greedy(oracle, *a))


@pytest.mark.parametrize("name", WHOLE)
def test_a_crowd_gets_what_each_gets_alone(made: dict[str, tuple[Path, Any]], name: str) -> None:
    path, oracle = made[name]
    check_crowd(path, lambda *a: greedy(oracle, *a), 250)


def test_mxfp4_stacks(made: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    """A stack is what its values are; one without scales, or of another shape, is refused."""
    path, _ = made["gpt_oss"]
    oracle = build("gpt_oss")
    tensors = write_mxfp4(path, tmp_path, oracle)
    prompt = text(40)
    check_logprobs(torch_executor(tmp_path), logits(oracle, prompt), prompt)
    name = "model.layers.0.mlp.experts.down_proj_scales"
    scales = tensors.pop(name)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"down_proj_blocks' has no scales"):
        torch_executor(tmp_path).load()
    save_file({**tensors, name: scales[:, :-1].contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no MXFP4 stack"):
        torch_executor(tmp_path).load()
