"""Contract: drafts change no answer. Whatever is guessed, at any rate of right guesses, over every
kind of cache, with prefixes shared, rows preempted, budgets and pages short: every request gets the
tokens and log-probabilities that it has alone, and the cache holds its invariants after each step.
Each way in which going back can be broken is shown to be noticed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.engine_drafts import KnowingDrafter, answers, draft_with
from support.engine_scenarios import scenario
from support.engine_traffic import Arrival, Wrong, serve
from support.engine_worlds import RECURRENT_SHAPES, SHAPES, VOCAB, crowd, prompt, talk, world
from support.image_mock import PAD, ImageMock, Seen, pixels, with_images
from support.mock_executor import group, mock_info

from sixfold.common.cache.states import States
from sixfold.common.config import EngineConfig
from sixfold.common.engine import Engine
from sixfold.common.errors import ConfigError, EngineDied
from sixfold.common.sampling import SamplingParams
from sixfold.common.scheduler.row import Row
from sixfold.common.scheduler.scheduler import Scheduler
from sixfold.common.scheduler.speculation import Speculation
from sixfold.platforms.interface import ExecutorInfo, Status, Support


def drafted(
    info: ExecutorInfo,
    config: EngineConfig,
    requests: list[Arrival],
    right: float,
    fewer: float = 0.3,
    **how: Any,
) -> Engine:
    known = KnowingDrafter(answers(requests, info), right, VOCAB, fewer)
    engine, _, _ = serve(info, config, requests, prepare=lambda e: draft_with(e, known), **how)
    return engine


@settings(
    max_examples=30,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(scenario(), st.sampled_from([0.0, 0.5, 0.9, 1.0]), st.integers(1, 5))
def test_any_traffic_gives_each_request_what_it_has_alone(
    case: tuple[ExecutorInfo, EngineConfig, list[Arrival], bool], right: float, most: int
) -> None:
    info, config, requests, lazy = case
    config = EngineConfig(
        prefix_cache=config.prefix_cache,
        eviction=config.eviction,
        draft="ngram",
        draft_tokens=most,
    )
    drafted(info, config, requests, right, lazy=lazy)


@pytest.mark.parametrize("number", range(len(SHAPES)))
def test_crowds_on_a_small_cache(number: int) -> None:
    """A rate of each kind per shape of caches; some rows are preempted, some find prefixes."""
    size, context = ((1, 48), (4, 64), (16, 96))[number % 3]
    rng = np.random.default_rng([7, number])
    info = world(size, SHAPES[number], 3 * -(-context // size) // 2, context, max_rows=6)
    requests = crowd(rng, info, 10, 12)
    config = EngineConfig(draft="ngram", draft_tokens=1 + number % 4)
    engine = drafted(info, config, requests, (0.8, 0.4)[number % 2])
    stats = engine.stats()
    assert 0 < stats.accepted_drafts < stats.drafted_tokens


def one(length: int = 5, **params: Any) -> Arrival:
    return Arrival(0, prompt(0, length, []), SamplingParams(**{"ignore_eos": True, **params}))


def test_right_guesses_save_steps_and_wrong_ones_cost_none() -> None:
    """4 drafts a step: 41 tokens take a step for the first and 8 for the others; with guesses that
    are all wrong, as many as without."""
    info, config = world(4, (0,), 40, 64), EngineConfig(draft="ngram", draft_tokens=4)
    requests = [one(max_tokens=41)]
    assert drafted(info, config, requests, 1.0, fewer=0).stats().steps == 9
    assert drafted(info, config, requests, 0.0, fewer=0).stats().steps >= 39


@pytest.mark.parametrize("right", [1.0, 0.6])
def test_ends_inside_a_run_of_right_guesses(right: float) -> None:
    """By length, by a stop token, with penalties and log-probabilities on the way."""
    info, config = world(4, (0, 2), 40, 64), EngineConfig(draft="ngram", draft_tokens=4)
    texts = {"temperature": 0.9, "logprobs": 3}
    requests = [one(max_tokens=n, seed=n, **texts) for n in range(1, 8)]
    requests += [one(max_tokens=30, seed=s, stop_token_ids=(5, 9, 11), **texts) for s in range(8)]
    penalties = {"frequency_penalty": 0.8, "repetition_penalty": 1.4, "presence_penalty": 0.3}
    requests += [one(max_tokens=20, seed=s, min_tokens=6, **texts, **penalties) for s in range(3)]
    requests += [one(max_tokens=20, seed=s, min_tokens=9, stop_token_ids=(5, 9)) for s in range(3)]
    engine = drafted(info, config, requests, right)
    assert engine.stats().finished["stop"] > 3


def test_drafts_stay_inside_the_budget_and_leave_prompts_theirs() -> None:
    info = world(4, (0,), 60, 64, max_rows=4, max_step_tokens=6)
    requests = [one(n, max_tokens=20, seed=n) for n in (4, 9, 13, 21, 30)]
    known = KnowingDrafter(answers(requests, info), 1.0, VOCAB)
    config = EngineConfig(draft="ngram", draft_tokens=5)
    _, executor, _ = serve(info, config, requests, prepare=lambda e: draft_with(e, known))
    for batch in executor.batches:
        assert len(batch.token_ids) <= 6
        chunk = np.diff(batch.query_start).max(initial=0)
        if batch.draft_counts is not None and chunk > 6 - batch.rows:
            assert batch.draft_counts.sum() <= 6 - batch.rows


def test_no_page_is_taken_from_others_for_a_guess() -> None:
    """Two rows share a cache that has one page each and none beyond, until one has ended."""
    info = world(4, (0,), 0, 16, max_rows=2)
    requests = [one(4, max_tokens=4), one(5, max_tokens=3)]
    config = EngineConfig(draft="ngram", draft_tokens=3, prefix_cache=False)
    assert drafted(info, config, requests, 1.0).stats().preemptions == 0


def test_the_head_drafts_where_it_has_places() -> None:
    """The mock's head is wrong mostly; it refuses to draft behind the pages of its row, and that a
    next token is not as told."""
    for number, shape in enumerate([(0,), (0, 2), (0, 5), (2, 5)]):
        info = world(4, shape, 30, 64, max_rows=4, max_step_tokens=11)
        rng = np.random.default_rng(number)
        config = EngineConfig(draft="mtp", draft_tokens=3)
        requests = [replace(each, abort_at=None) for each in crowd(rng, info, 8, 10)]
        engine, _, _ = serve(info, config, requests)
        assert engine.stats().drafted_tokens > 30


def test_images_before_drafts() -> None:
    """Behind an image positions for rotary embedding are others than places; the mock looks."""
    info = with_images(mock_info([group("full", 80, 4)], max_context=120))
    params = SamplingParams(max_tokens=14, temperature=0.0, ignore_eos=True)
    requests = [
        Seen.of([1, 2, 3], pixels(0), [4, 5]).arrival(0, params),
        Seen.of([7], pixels(1), [6, 5, 4]).arrival(2, params),
        one(7, max_tokens=14),
    ]
    config = EngineConfig(draft="ngram", draft_tokens=3)
    # The mock takes a placeholder that is guessed for one without its image.
    known = KnowingDrafter(answers(requests, info), 0.7, PAD)
    prepare = {"prepare": lambda engine: draft_with(engine, known)}
    engine, _, _ = serve(info, config, requests, make=ImageMock, **prepare)
    assert engine.stats().accepted_drafts > 8


def test_steps_do_not_overlap() -> None:
    info, config = world(4, (0,), 40, 64), EngineConfig(draft="ngram")
    requests = [one(max_tokens=12)]
    known = KnowingDrafter(answers(requests, info), 0.5, VOCAB)
    _, executor, _ = serve(info, config, requests, prepare=lambda e: draft_with(e, known))
    assert executor.depth == 1


def test_platforms_that_verify_nothing_refuse() -> None:
    for features in ({}, {"drafts": Support(Status.NO, "It has no way to.")}):
        info = mock_info(world(4, (0,), 1, 16).groups, features=features)
        with pytest.raises(ConfigError, match="cannot be had on platform 'mock'"):
            Engine(None, info, EngineConfig(draft="ngram"), frozenset())  # type: ignore[arg-type]


# ---- faults: each way of going back, broken

Break = Callable[[pytest.MonkeyPatch], None]


def state_not_taken_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(States, "take_back", lambda self, sequence: sequence.kept_at)


def state_not_kept(patch: pytest.MonkeyPatch) -> None:
    def keep(self: States, sequence: Any, computed: int, spare: int) -> bool:
        moves = len(self._moves)
        kept = honest(self, sequence, computed, spare)
        del self._moves[moves:]
        return kept

    honest = States.keep
    patch.setattr(States, "keep", keep)


def state_gone_on_from(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Speculation, "restore", lambda self, part, tokens: None)


def row_not_taken_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Speculation, "settle", lambda self, part, tokens: None)


def wrong_tail_published(patch: pytest.MonkeyPatch) -> None:
    """As if a row's pages held its known tokens wherever it ends."""

    def publish(self: Scheduler, row: Row, end: int) -> None:
        self.cache.publish(row.sequence, row.keys[: row.known], row.priority)  # type: ignore[arg-type]

    patch.setattr(Scheduler, "_publish", publish)


def window_slides_too_far(patch: pytest.MonkeyPatch) -> None:
    """By what the row would be at if all were right."""

    def extend(self: Speculation, parts: Any, running: int) -> Any:
        made = honest(self, parts, running)
        for part in made:
            self._cache.slide(part.row.sequence, part.start + part.count)
        return made

    honest = Speculation.extend
    patch.setattr(Speculation, "extend", extend)


WINDOWS, STATES, PAGES = ((0, 3), (2,)), RECURRENT_SHAPES[:2], ((0,), (0, 2))


@pytest.mark.parametrize(
    ("fault", "shapes"),
    [
        (state_not_taken_back, STATES),
        (state_not_kept, STATES),
        (state_gone_on_from, STATES),
        (row_not_taken_back, PAGES),
        (wrong_tail_published, PAGES),
        (window_slides_too_far, WINDOWS),
    ],
)
def test_a_broken_way_back_is_noticed(
    fault: Break, shapes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crowds() -> None:
        for number, shape in enumerate(shapes):
            info = world(4, shape, 60, 64, max_rows=6)
            rng = np.random.default_rng(number)
            config = EngineConfig(draft="ngram", draft_tokens=4)
            for requests in (crowd(rng, info, 7, 8), talk(info, 5)):
                drafted(info, config, requests, 0.6)

    crowds()
    fault(monkeypatch)
    with pytest.raises((Wrong, EngineDied)):
        crowds()
