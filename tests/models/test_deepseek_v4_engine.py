"""Contract: DeepSeek-V4 through engine and torch executor gives each request the tokens that
transformers gives it: beside rows of other lengths, in chunks, after a prefix hit that restores
windows, entries and open spans, after preemption, in pages of any size.

By teacher forcing: at every position, transformers' argmax must be our next token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.run_engine import finish, serving, torch_executor
from support.tiny_deepseek_v4 import expected_logits, oracle, prompt, tensors, write

from sixfold.common.engine import Engine
from sixfold.common.messages import AddRequest, Output
from sixfold.common.sampling import SamplingParams
from sixfold.platforms.torch_runtime.site_pools import TorchStatePool

STEPS = 14
Prompt = list[int]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("deepseek_v4"), tensors())


@pytest.fixture(scope="module")
def model(path: Path) -> Any:
    return oracle(path)


def tokens(length: int, seed: int = 1) -> list[int]:
    return prompt(length, seed).tolist()


@contextmanager
def running(path: Path, **fields: Any) -> Iterator[Engine]:
    with serving(torch_executor(path, dtype="float32", **fields)) as (engine, _):
        yield engine


def greedy(steps: int) -> SamplingParams:
    return SamplingParams(max_tokens=steps, temperature=0.0, ignore_eos=True, logprobs=0)


def complete(engine: Engine, prompts: Sequence[Prompt], steps: int) -> list[list[Output]]:
    """All prompts at once: what was said about each."""
    for i, given in enumerate(prompts):
        engine.add(AddRequest(request_id=str(i), prompt_ids=given, params=greedy(steps)))
    found = finish(engine)
    return [found[str(i)] for i in range(len(prompts))]


def tokens_of(outputs: Sequence[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def cached_of(outputs: Sequence[Output]) -> int:
    """Tokens of the prompt that were found in the cache."""
    return next(o.cached_tokens for o in outputs if o.cached_tokens is not None)


def differs(model: Any, given: Prompt, outputs: Sequence[Output]) -> str:
    """Where our tokens or their log-probabilities are not the oracle's, or ""."""
    made = tokens_of(outputs)
    logits = expected_logits(model, torch.tensor(given + made[:-1]))[len(given) - 1 :]
    wrong = np.flatnonzero(logits.argmax(-1).numpy() != np.array(made))
    if len(wrong):
        return f"token {wrong[0]} of {made} after {len(given)}"
    ours = np.array([entry.logprob for output in outputs for entry in output.logprobs or ()])
    theirs = logits.log_softmax(-1).amax(-1).numpy()
    return "" if np.allclose(ours, theirs, atol=1e-3) else f"{ours} is not {theirs}"


@pytest.mark.parametrize("page_size", [1, 16, 128])
def test_unlike_rows_in_chunks(path: Path, model: Any, page_size: int) -> None:
    prompts = [tokens(n, n) for n in (1, 61, 7, 34)]
    fields = {"page_size": page_size, "max_step_tokens": 24, "max_context": 128}
    with running(path, **fields) as engine:
        found = complete(engine, prompts, STEPS)
    for given, outputs in zip(prompts, found, strict=True):
        assert len(tokens_of(outputs)) == STEPS
        assert not differs(model, given, outputs)


@pytest.mark.parametrize("page_size", [1, 16, 128])
def test_a_prefix_hit_goes_on_from_restored_state(path: Path, model: Any, page_size: int) -> None:
    shared = tokens(150, 5)
    with running(path, page_size=page_size, max_context=256, max_step_tokens=64) as engine:
        complete(engine, [[*shared, 7, 9]], 2)
        # The first to branch off leaves a snapshot where it does, and the next ones begin there.
        complete(engine, [[*shared, 8]], 2)
        prompts = [[*shared, 11, 12, 13], [*shared, 21]]
        found = complete(engine, prompts, STEPS)
    for given, outputs in zip(prompts, found, strict=True):
        assert cached_of(outputs) >= 128
        assert not differs(model, given, outputs)


def test_the_next_turn_begins_where_the_last_one_was_kept(path: Path, model: Any) -> None:
    given = tokens(40, 6)
    with running(path, page_size=16, max_context=256) as engine:
        for turn in range(3):
            (outputs,) = complete(engine, [given], 20)
            assert not differs(model, given, outputs)
            assert (cached_of(outputs) > 0) == (turn > 0)
            given = given + tokens_of(outputs) + tokens(5, 10 + turn)


def test_preempted_rows_start_over(path: Path, model: Any) -> None:
    prompts = [tokens(n, n) for n in (40, 33, 47)]
    fields = {"page_size": 4, "cache_tokens": 96, "max_context": 80, "max_step_tokens": 32}
    with running(path, **fields) as engine:
        found = complete(engine, prompts, 30)
        assert engine.stats().preemptions > 0
    for given, outputs in zip(prompts, found, strict=True):
        assert not differs(model, given, outputs)


def test_each_gets_what_it_gets_alone(path: Path, model: Any) -> None:
    """Arrivals at any time, over few prefixes, two given up, in less room than they would like."""
    rng = np.random.default_rng(1)
    prefixes = [tokens(50, 50 + i) for i in range(2)]
    prompts = [
        prefixes[rng.integers(2)][: rng.integers(1, 50)] + tokens(int(rng.integers(1, 4)), 70 + i)
        for i in range(12)
    ]
    arrival = rng.integers(0, 25, len(prompts))
    fields = {"page_size": 4, "cache_tokens": 160, "max_context": 80, "max_step_tokens": 12}
    made: list[list[Output]] = [[] for _ in prompts]
    ends: dict[int, str] = {}
    with running(path, max_rows=4, **fields) as engine:
        step = 0
        while len(ends) < len(prompts):
            for i in np.flatnonzero(arrival == step).tolist():
                engine.add(
                    AddRequest(request_id=str(i), prompt_ids=prompts[i], params=greedy(STEPS))
                )
            engine.abort([str(i) for i in (2, 5) if arrival[i] + 4 == step])
            for output in engine.step() if engine.has_work else ():
                made[int(output.request_id)].append(output)
                if output.finish_reason is not None:
                    ends[int(output.request_id)] = output.finish_reason
            step += 1
    for i, (given, ours) in enumerate(zip(prompts, made, strict=True)):
        assert ends[i] == "length" or i in (2, 5)
        assert not tokens_of(ours) or not differs(model, given, ours)


def test_a_state_that_is_not_restored_shows(
    path: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgotten(self: TorchStatePool, sources: Any, targets: Any) -> None:
        for array in self.data:
            array[:, torch.tensor(targets)] = 0

    monkeypatch.setattr(TorchStatePool, "copy", forgotten)
    shared, wrong = tokens(150, 5), ""
    with running(path, page_size=2, max_context=256, max_step_tokens=64) as engine:
        for last in range(4):
            given = [*shared[: 146 + last // 2], last]
            (outputs,) = complete(engine, [given], STEPS)
            wrong = wrong or differs(model, given, outputs)
    assert wrong
