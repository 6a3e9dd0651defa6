"""An engine over an executor of a test's own, run to the end of its requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support.kernel_checks import cpu_facts
from torch import Tensor

from sixfold.common.config import EngineConfig
from sixfold.common.engine import Engine
from sixfold.common.messages import AddRequest, Output
from sixfold.common.sampling import SamplingParams
from sixfold.platforms.cpu.device import CpuDevice
from sixfold.platforms.cpu.kernels import register
from sixfold.platforms.interface import EngineSpec, Executor, ExecutorInfo
from sixfold.platforms.torch_runtime.executor import TorchExecutor

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


def torch_executor(path: Path | str, **fields: Any) -> TorchExecutor:
    """On this machine's CPU kernels, with one thread."""
    device = CpuDevice(cpu_facts(), threads=1)
    spec = {"max_rows": 8, "max_context": 128, "page_size": 4, **fields}
    return TorchExecutor(
        EngineSpec(str(path), **spec), device, lambda registry: register(registry, device)
    )


@contextmanager
def serving(
    executor: Executor, config: EngineConfig | None = None
) -> Iterator[tuple[Engine, ExecutorInfo]]:
    try:
        info = executor.load()
        steps = {"max_rows": info.max_rows, "max_step_tokens": info.max_step_tokens}
        yield Engine(executor, info, config or EngineConfig(**steps), frozenset()), info
    finally:
        executor.close()


def finish(engine: Engine) -> dict[str, list[Output]]:
    """Step until nothing is left; outputs by request."""
    found: dict[str, list[Output]] = {}
    while engine.has_work:
        for output in engine.step():
            assert output.error is None, output.error
            found.setdefault(output.request_id, []).append(output)
    return found


def complete(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams] = GREEDY,
) -> list[list[int]]:
    """Tokens of all prompts, asked at once."""
    every = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    for i, (prompt, own) in enumerate(zip(prompts, every, strict=True)):
        engine.add(AddRequest(request_id=str(i), prompt_ids=list(prompt), params=own))
    found = finish(engine)
    return [[t for o in found[str(i)] for t in o.token_ids] for i in range(len(prompts))]


@contextmanager
def one_thread() -> Iterator[None]:
    """torch's, for oracles: two of them on a busy machine wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check_logprobs(executor: Executor, expected: Tensor, prompt: list[int]) -> None:
    """The engine's prompt log-probabilities against the oracle's logits (T, vocabulary)."""
    want = expected.log_softmax(-1)
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=20)
    with serving(executor) as (engine, _):
        engine.add(AddRequest(request_id="0", prompt_ids=prompt, params=params))
        found = [o.prompt_logprobs for o in finish(engine)["0"] if o.prompt_logprobs]
    rows = found[0]
    assert len(rows) == len(prompt)
    for position, row in enumerate(rows[1:]):
        assert row is not None
        assert row.token_id == prompt[position + 1]
        ids = torch.tensor([row.token_id, *row.top_ids])
        values = torch.tensor([row.logprob, *row.top_logprobs])
        torch.testing.assert_close(values, want[position, ids], atol=2e-4, rtol=1e-4)


Greedy = Callable[[list[int], int], list[int]]
"""The oracle: a prompt's continuation by so many tokens."""


def check_prefix_hits(
    executor: Executor, prompts: list[list[int]], reused: list[int], greedy: Greedy
) -> None:
    """One prompt after the other: how much of each came from the cache, and what follows it."""
    steps = 8
    params = SamplingParams(max_tokens=steps, temperature=0.0, ignore_eos=True)
    with serving(executor) as (engine, _):
        for prompt, cached in zip(prompts, reused, strict=True):
            engine.add(AddRequest(request_id="0", prompt_ids=prompt, params=params))
            outputs = finish(engine)["0"]
            assert max(o.cached_tokens or 0 for o in outputs) == cached
            assert [t for o in outputs for t in o.token_ids] == greedy(prompt, steps)


def check_crowd(path: Path, greedy: Greedy, vocabulary: int) -> None:
    """Few rows and few pages: rows wait, share prefixes, are preempted, and differ in length."""
    rng, steps = np.random.default_rng(3), 8
    shared = rng.integers(2, vocabulary, 40).tolist()
    prompts = [
        shared[: rng.integers(1, 40)] + rng.integers(2, vocabulary, rng.integers(1, 16)).tolist()
        for _ in range(12)
    ]
    params = SamplingParams(max_tokens=steps, temperature=0.0, ignore_eos=True)
    fields = {"max_rows": 4, "max_step_tokens": 24, "cache_tokens": 64, "max_context": 64}
    with serving(torch_executor(path, **fields)) as (engine, _):
        made = complete(engine, prompts, params)
        preempted = engine.stats().preemptions
    assert made == [greedy(prompt, steps) for prompt in prompts]
    assert preempted
