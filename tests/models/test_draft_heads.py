"""Contract: a draft head guesses what its published description says, from the published tensors,
for Qwen3.5 (dense, experts), DeepSeek-V3 and DeepSeek-V4: one token and several, after prompts in
chunks, beside other rows, after a prefix hit, behind guesses that were wrong and were right; and no
answer changes by it. The engine's own guesses are read where it holds them, before they are used.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from support.draft_oracles import MAKE, Oracle
from support.engine_drafts import KnowingDrafter, draft_with
from support.run_engine import complete, one_thread, serving, torch_executor
from support.tiny_models import TINY, save

from sixfold.common.config import EngineConfig
from sixfold.common.engine import Engine
from sixfold.common.errors import CheckpointError
from sixfold.common.messages import AddRequest
from sixfold.common.sampling import SamplingParams
from sixfold.common.speculative.drafters import HeadDrafter

GREEDY = SamplingParams(max_tokens=11, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module", params=MAKE)
def oracle(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Oracle]:
    with one_thread():
        yield MAKE[request.param](tmp_path_factory.mktemp(request.param))


def text(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(2, 250, length).tolist()


class Mixed(HeadDrafter):
    """What the head proposes is noted; every other time what is verified is right, or half so."""

    def __init__(self, answers: dict[str, list[int]]) -> None:
        self.noted: list[tuple[list[int], tuple[int, ...]]] = []
        self._knowing = KnowingDrafter(answers, 0.7, 250)

    def propose(self, row: Any, most: int) -> tuple[int, ...]:
        if row.proposed:
            self.noted.append((row.tokens[: row.known].tolist(), row.proposed))
        return self._knowing.propose(row, most)


def noted(
    engine: Engine, prompts: list[list[int]], answers: list[list[int]], params: SamplingParams
) -> list[tuple[list[int], tuple[int, ...]]]:
    drafter = Mixed({str(i): answer for i, answer in enumerate(answers)})
    draft_with(engine, drafter)
    assert complete(engine, prompts, params) == answers
    return drafter.noted


def settings(draft: str | None, tokens: int = 3, **fields: Any) -> tuple[dict[str, Any], Any]:
    steps = {"max_rows": 8, "max_step_tokens": fields.get("max_step_tokens", 256)}
    spec = {"dtype": "float32", "max_context": 128, "draft": draft, "draft_tokens": tokens}
    return {**spec, **fields, **steps}, EngineConfig(draft=draft, draft_tokens=tokens, **steps)


def plain(path: Path, prompts: list[list[int]]) -> list[list[int]]:
    spec, config = settings(None)
    with serving(torch_executor(path, **spec), config) as (engine, _):
        return complete(engine, prompts, GREEDY)


@pytest.mark.parametrize(
    ("tokens", "budget"), [pytest.param(1, 256, marks=pytest.mark.wide), (3, 13)]
)
def test_guesses_are_the_heads(oracle: Oracle, tokens: int, budget: int) -> None:
    """The last prompt goes on from the pages of the first, in which the head's entries are too."""
    first = text(33, 1)
    prompts = [first, text(9, 2), text(2, 3)]
    answers = plain(oracle.path, [*prompts, [*first, *text(5, 4)]])
    spec, config = settings("mtp", tokens, max_step_tokens=budget)
    with serving(torch_executor(oracle.path, **spec), config) as (engine, info):
        assert "draft head" in {decision.what for decision in info.decisions}
        found = noted(engine, prompts, answers[:3], GREEDY)
        before = engine.stats().cached_tokens
        found += noted(engine, [[*first, *text(5, 4)]], answers[3:], GREEDY)
        stats = engine.stats()
    assert stats.cached_tokens > before
    assert 0 < stats.accepted_drafts < stats.drafted_tokens
    assert len(found) > 10
    lengths = set()
    for known, proposed in found:
        lengths.add(len(proposed))
        assert list(proposed) == oracle.guesses(known, len(proposed)), known
    assert max(lengths) == tokens


def test_its_own_guesses_change_no_answer(oracle: Oracle) -> None:
    """Eight at once, in a cache that holds some of them, seeded and greedy."""
    prompts = [text(n, n) for n in (5, 40, 17, 30, 3, 26, 11, 37)]
    params = [
        SamplingParams(
            max_tokens=10, temperature=0.7 * (i % 2), seed=i, ignore_eos=True, logprobs=2
        )
        for i in range(8)
    ]
    said = []
    for draft in (None, "mtp"):
        spec, config = settings(draft, cache_tokens=160)
        with serving(torch_executor(oracle.path, **spec), config) as (engine, _):
            said.append(told(engine, prompts, params))
            assert engine.stats().preemptions > 0
    assert [tokens for tokens, _ in said[0]] == [tokens for tokens, _ in said[1]]
    for (_, want), (_, got) in zip(*said, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-4)


def told(
    engine: Engine, prompts: list[list[int]], params: list[SamplingParams]
) -> list[tuple[list[int], list[float]]]:
    """Tokens and log-probabilities of each."""
    made: list[tuple[list[int], list[float]]] = [([], []) for _ in prompts]
    for i, (prompt, own) in enumerate(zip(prompts, params, strict=True)):
        engine.add(AddRequest(request_id=str(i), prompt_ids=prompt, params=own))
    while engine.has_work:
        for output in engine.step():
            assert output.error is None, output.error
            made[int(output.request_id)][0].extend(output.token_ids)
            made[int(output.request_id)][1].extend(e.logprob for e in output.logprobs or ())
    return made


def test_without_a_head_there_is_one_sentence(oracle: Oracle, tmp_path: Path) -> None:
    """A family that has none, and a checkpoint that lacks its tensors; ngrams are named instead."""
    (tmp_path / "bare").mkdir()
    shutil.copy(oracle.path / "config.json", tmp_path / "bare")
    stored = load_file(oracle.path / "model.safetensors")
    head = "mtp." if any(name.startswith("mtp.") for name in stored) else "model.layers.3."
    kept = {name: tensor for name, tensor in stored.items() if not name.startswith(head)}
    save_file(kept, tmp_path / "bare" / "model.safetensors")
    save(TINY["llama"].model(), tmp_path / "llama")
    for name, words in (("llama", "family without one"), ("bare", "no tensors of one")):
        with pytest.raises(CheckpointError, match=f"{words}.*Use --draft ngram"):
            torch_executor(tmp_path / name, draft="mtp").load()
