"""Random traffic for an engine over the mock executor, as hypothesis strategies."""

from __future__ import annotations

from hypothesis import strategies as st
from support.engine_traffic import Arrival
from support.engine_worlds import SHAPES, VOCAB, prompt, world

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
