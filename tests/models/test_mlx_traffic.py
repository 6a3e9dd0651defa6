"""Contract: on the MLX platform every request gets the tokens that it gets alone, whatever arrives
when, shares a prefix, is preempted, evicted or aborted: the promise of test_engine_random.py, with
a real executor under the scheduler."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.run_mlx import running
from support.tiny_mlx import VOCAB, own_greedy, write

from sixfold.common.messages import AddRequest
from sixfold.common.sampling import SamplingParams

STEPS = 14
REQUESTS = 14


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "deepseek_v3", "qwen3_5"])
@pytest.mark.parametrize("seed", [0, 1])
def test_each_gets_what_it_gets_alone(tmp_path: Path, name: str, seed: int) -> None:
    path = write(tmp_path / name, name)
    rng = np.random.default_rng(seed)
    prefixes = rng.integers(0, VOCAB, (3, 30)).tolist()
    prompts = [
        prefixes[rng.integers(3)][: rng.integers(1, 30)]
        + rng.integers(0, VOCAB, rng.integers(1, 4)).tolist()
        for _ in range(REQUESTS)
    ]
    arrival = rng.integers(0, 25, REQUESTS)
    given_up = {i: int(arrival[i]) + 4 for i in rng.integers(0, REQUESTS, 2).tolist()}
    expected = own_greedy(path, prompts, STEPS)
    params = SamplingParams(max_tokens=STEPS, temperature=0.0, ignore_eos=True)
    tokens: list[list[int]] = [[] for _ in prompts]
    ends: dict[int, str | None] = {}
    # Room for fewer rows than run, in steps of few tokens.
    fields = {"max_rows": 5, "max_step_tokens": 12, "cache_tokens": 120, "max_context": 60}
    with running(path, page_size=4, **fields) as (engine, _):
        step = 0
        while len(ends) < REQUESTS:
            for i in np.flatnonzero(arrival == step).tolist():
                request = AddRequest(request_id=str(i), prompt_ids=prompts[i], params=params)
                engine.add(request)
            engine.abort([str(i) for i, at in given_up.items() if at == step])
            if engine.has_work:
                for output in engine.step():
                    tokens[int(output.request_id)] += output.token_ids
                    if output.finish_reason is not None:
                        ends[int(output.request_id)] = output.finish_reason
            step += 1
        pages = engine.stats().pages
    for i, (ours, wanted) in enumerate(zip(tokens, expected, strict=True)):
        if ends[i] == "length":
            assert ours == wanted
        else:
            assert ends[i] == "abort"
            assert ours == wanted[: len(ours)]
    assert sum(end == "length" for end in ends.values()) >= REQUESTS - 2
    for free, evictable, pinned, total in pages.values():
        assert (pinned, free + evictable) == (0, total)
