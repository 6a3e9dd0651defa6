"""Guards the engine's promise as a whole: whatever arrives, is shared, preempted, evicted or
aborted, every request finishes, its output is the one it has alone, and no page is lost or shared
wrongly."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.engine_traffic import Arrival, serve
from support.engine_worlds import RECURRENT_SHAPES, SHAPES, VOCAB, crowd, prompt, world

from sixfold.common.config import EngineConfig
from sixfold.common.sampling import SamplingParams
from sixfold.platforms.interface import ExecutorInfo


@st.composite
def params(draw: st.DrawFn, most: int) -> SamplingParams:
    few = st.integers(0, 9)  # most requests are plain
    return SamplingParams(
        max_tokens=draw(st.integers(1, most)) if draw(few) else None,
        temperature=draw(st.sampled_from([0.0, 0.7, 1.3])),
        seed=draw(st.integers(-(2**63), 2**63 - 1)),
        top_k=draw(st.sampled_from([0, 0, 1, 5])),
        top_p=draw(st.sampled_from([1.0, 1.0, 0.6])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.2])),
        repetition_penalty=1.0 if draw(few) else 1.3,
        frequency_penalty=0.0 if draw(few) else 0.5,
        presence_penalty=0.0 if draw(few) else -0.5,
        logit_bias={} if draw(few) else {3: 2.0, 0: -1.0},
        stop_token_ids=() if draw(few) else (5, 9),
        min_tokens=0 if draw(few) else 1,
        ignore_eos=not draw(few),
        logprobs=None if draw(few) else draw(st.integers(0, 3)),
        prompt_logprobs=None if draw(few) else draw(st.integers(0, 3)),
    )


@st.composite
def arrivals(draw: st.DrawFn, context: int, most: int) -> list[Arrival]:
    result = []
    for _ in range(draw(st.integers(1, most))):
        shared = draw(st.integers(0, context - 12))
        own = draw(st.lists(st.integers(0, VOCAB - 1), max_size=5))
        text = prompt(draw(st.integers(0, 1)), shared, own)
        at = draw(st.integers(0, 20))
        gives_up = draw(st.integers(0, 5)) == 0
        result.append(
            Arrival(
                at,
                text,
                draw(params(context - len(text))),
                draw(st.integers(0, 2)),
                at + draw(st.integers(0, 8)) if gives_up else None,
            )
        )
    return result


@st.composite
def scenario(draw: st.DrawFn) -> tuple[ExecutorInfo, EngineConfig, list[Arrival], bool]:
    size = draw(st.sampled_from([1, 4, 16]))
    context = draw(st.integers(16, 24 if size == 1 else 40))
    rows = draw(st.integers(1, 6))
    info = world(
        size,
        draw(st.sampled_from(SHAPES)),
        draw(st.sampled_from([0, 1, 3, 8, 40])),
        context,
        max_rows=rows,
        max_step_tokens=rows + draw(st.sampled_from([0, 1, 5, 16, 64])),
        overlap=draw(st.booleans()),
        mixed_steps=draw(st.booleans()),
    )
    config = EngineConfig(
        prefix_cache=draw(st.integers(0, 4)) > 0,
        eviction=draw(st.sampled_from(["lru", "lfu", "priority"])),
        overlap=draw(st.integers(0, 4)) > 0,
    )
    return info, config, draw(arrivals(context, 8)), draw(st.booleans())


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
