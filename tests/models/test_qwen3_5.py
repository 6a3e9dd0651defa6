"""Contract: Qwen3.5, dense and with experts, computes transformers' logits from the published
names, through the executor and the engine: in chunks of any size, token by token, in batches of
unequal rows, after a prefix hit with its state restored, after preemption, with any page size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.run_engine import (
    check_crowd,
    check_logprobs,
    check_prefix_hits,
    one_thread,
    torch_executor,
)
from support.run_mlx import mlx_executor
from support.tiny_qwen3_5 import NAMES, VOCAB, greedy, logits, write

TEXT = VOCAB - 20  # ids below are text


@pytest.fixture(scope="module", params=NAMES)
def model(request: Any, tmp_path_factory: Any) -> Iterator[tuple[Path, Any]]:
    with one_thread():
        yield write(tmp_path_factory.mktemp("qwen3_5") / request.param, request.param)


def text(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(2, TEXT, length).tolist()


@pytest.mark.parametrize("chunk", [512, 70, 9])
def test_prompt_logprobs_are_those_of_transformers(model: tuple[Path, Any], chunk: int) -> None:
    path, oracle = model
    prompt = text(150)
    executor = torch_executor(path, max_context=256, max_step_tokens=chunk)
    check_logprobs(executor, logits(oracle, prompt), prompt)


def test_the_mlx_platform_computes_the_same(model: tuple[Path, Any]) -> None:
    """The same directory by mlx-lm's own model under the same engine."""
    path, oracle = model
    prompt = text(40)
    check_logprobs(mlx_executor(path), logits(oracle, prompt), prompt)


@pytest.mark.parametrize("page_size", [1, 16, 128])
def test_a_prefix_hit_goes_on_from_the_restored_state(
    model: tuple[Path, Any], page_size: int
) -> None:
    """The second text leaves the first after 140 tokens, and a state stays there for the third; the
    last is the first again."""
    path, oracle = model
    first = text(150)
    prompts = [first, first[:140] + text(20, 1), first[:140] + text(20, 2), first]
    before = 128 if page_size == 128 else 0  # of the first text's own last boundary
    reused = [0, before, 140 // page_size * page_size, 149 // page_size * page_size]
    executor = torch_executor(path, page_size=page_size, max_context=256, max_step_tokens=64)
    check_prefix_hits(executor, prompts, reused, lambda *a: greedy(oracle, *a))


def test_a_crowd_gets_what_each_gets_alone(model: tuple[Path, Any]) -> None:
    path, oracle = model
    check_crowd(path, lambda *a: greedy(oracle, *a), TEXT)
