"""Contract: Qwen3.5, dense and with experts, computes transformers' logits from the published
names, through the executor and the engine: in chunks of any size, token by token, in batches of
unequal rows, after a prefix hit with its state restored, after preemption, with any page size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.run_engine import complete, finish, serving, torch_executor
from support.run_mlx import mlx_executor
from support.tiny_qwen3_5 import NAMES, VOCAB, greedy, logits, write

from sixfold.common.messages import AddRequest
from sixfold.common.sampling import SamplingParams
from sixfold.platforms.interface import Executor

STEPS = 8
GREEDY = SamplingParams(max_tokens=STEPS, temperature=0.0, ignore_eos=True)
SCORED = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=20)


@pytest.fixture(scope="module", params=NAMES)
def model(request: Any, tmp_path_factory: Any) -> Iterator[tuple[Path, Any]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield write(tmp_path_factory.mktemp("qwen3_5") / request.param, request.param)
    torch.set_num_threads(threads)


def text(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(2, VOCAB - 20, length).tolist()


@pytest.mark.parametrize("chunk", [512, 70, 9])
def test_prompt_logprobs_are_those_of_transformers(model: tuple[Path, Any], chunk: int) -> None:
    path, oracle = model
    prompt = text(150)
    executor = torch_executor(path, max_context=256, max_step_tokens=chunk)
    check_logprobs(executor, oracle, prompt)


def test_the_mlx_platform_computes_the_same(model: tuple[Path, Any]) -> None:
    """The same directory by mlx-lm's own model under the same engine."""
    path, oracle = model
    check_logprobs(mlx_executor(path), oracle, text(40))


def check_logprobs(executor: Executor, oracle: Any, prompt: list[int]) -> None:
    want = logits(oracle, prompt).log_softmax(-1)
    with serving(executor) as (engine, _):
        engine.add(AddRequest(request_id="0", prompt_ids=prompt, params=SCORED))
        found = [o.prompt_logprobs for o in finish(engine)["0"] if o.prompt_logprobs]
    rows = found[0]
    assert len(rows) == len(prompt)
    for position, row in enumerate(rows[1:]):
        assert row.token_id == prompt[position + 1]
        assert abs(row.logprob - float(want[position, row.token_id])) < 2e-4
        for token, value in zip(row.top_ids, row.top_logprobs, strict=True):
            assert abs(value - float(want[position, token])) < 2e-4


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
    fields = {"page_size": page_size, "max_context": 256, "max_step_tokens": 64}
    with serving(torch_executor(path, **fields)) as (engine, _):
        for prompt, cached in zip(prompts, reused, strict=True):
            engine.add(AddRequest(request_id="0", prompt_ids=prompt, params=GREEDY))
            outputs = finish(engine)["0"]
            assert max(o.cached_tokens or 0 for o in outputs) == cached
            assert [t for o in outputs for t in o.token_ids] == greedy(oracle, prompt, STEPS)


def test_a_crowd_gets_what_each_gets_alone(model: tuple[Path, Any]) -> None:
    """Few rows and few pages: rows wait, share prefixes, and are preempted."""
    path, oracle = model
    rng = np.random.default_rng(3)
    shared = text(40, 7)
    prompts = [
        shared[: rng.integers(1, 40)] + text(int(rng.integers(1, 16)), 100 + i) for i in range(12)
    ]
    fields = {"max_rows": 4, "max_step_tokens": 24, "cache_tokens": 64, "max_context": 64}
    with serving(torch_executor(path, **fields)) as (engine, _):
        made = complete(engine, prompts, GREEDY)
        preempted = engine.stats().preemptions
    assert made == [greedy(oracle, prompt, STEPS) for prompt in prompts]
    assert preempted
