"""Guards the engine's promise as a whole: whatever arrives, is shared, preempted, evicted or
aborted, every request finishes, its output is the one it has alone, and no page is lost or shared
wrongly."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from support.engine_scenarios import scenario
from support.engine_traffic import Arrival, serve
from support.engine_worlds import RECURRENT_SHAPES, SHAPES, crowd, world

from sixfold.common.config import EngineConfig
from sixfold.platforms.interface import ExecutorInfo


@settings(
    max_examples=250,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(scenario())
def test_any_traffic_gives_each_request_what_it_has_alone(
    case: tuple[ExecutorInfo, EngineConfig, list[Arrival], bool],
) -> None:
    info, config, requests, lazy = case
    serve(info, config, requests, lazy)


@pytest.mark.parametrize("eviction", ["lru", "lfu", "priority"])
@pytest.mark.parametrize(
    ("size", "context", "preempted"), [(1, 48, 10), (4, 64, 10), (16, 96, 5), (128, 400, 0)]
)
def test_crowds_on_a_small_cache(size: int, context: int, preempted: int, eviction: str) -> None:
    preemptions = cached = 0
    for number, shape in enumerate(SHAPES):
        rng = np.random.default_rng([size, number, len(eviction)])
        info = world(
            size,
            shape,
            (1 + number % 3) * -(-context // size) // 2,
            context,
            max_rows=8,
            max_step_tokens=40,
            overlap=number != 3,
        )
        count = 10 if shape in RECURRENT_SHAPES else 22  # they have a test of their own below
        count //= 1 + size // 128  # the mock reads a whole context for each of its tokens
        requests = crowd(rng, info, count, 30)
        config = EngineConfig(eviction=eviction, overlap=number % 2 == 0)
        engine, _, _ = serve(info, config, requests, audit=number == 1)
        preemptions += engine.stats().preemptions
        cached += engine.stats().cached_tokens
    assert preemptions >= preempted
    assert cached > 1000


@pytest.mark.parametrize("shape", RECURRENT_SHAPES)
def test_crowds_with_few_state_slots(shape: tuple[int, ...]) -> None:
    """From no slot beyond one per row to plenty, steps overlapping or not, mixed or not."""
    cached = copies = 0
    for number, spare in enumerate((0, 1, 3, 40)):
        rng = np.random.default_rng([number, len(shape)])
        size = (4, 1, 16)[number % 3]
        info = world(
            size,
            shape,
            spare,
            48,
            max_rows=6,
            max_step_tokens=(40, 9)[number % 2],
            overlap=number % 2 == 0,
            mixed_steps=number % 3 > 0,
        )
        config = EngineConfig(overlap=number != 2)
        engine, executor, _ = serve(info, config, crowd(rng, info, 20, 10))
        cached += engine.stats().cached_tokens
        copies += sum(len(batch.moves) for batch in executor.batches)
    assert cached > 60
    assert copies > 40
