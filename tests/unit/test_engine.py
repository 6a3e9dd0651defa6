"""Guards Engine: the loop over an executor, what each message carries, and how it ends when a step
fails."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import msgspec
import numpy as np
import pytest
from support.engine_traffic import EOS, Arrival, Wrong, audit_empty, compare, draw, run, serve
from support.engine_worlds import SHAPES, TOKENS, world
from support.mock_executor import MockExecutor, group, mock_info
from support.mock_model import alone

from sixfold.common import messages
from sixfold.common.config import EngineConfig
from sixfold.common.engine import Engine
from sixfold.common.errors import EngineDied, RequestError
from sixfold.common.messages import AddRequest, Output
from sixfold.common.sampling import SamplingParams
from sixfold.platforms.interface_step import StepBatch, StepResult

GROUPS = (group("full", 200, 4), group("window", 60, 4, window=10))


def engine_of(**changes: Any) -> tuple[Engine, MockExecutor]:
    config = EngineConfig(overlap=changes.pop("config_overlap", True))
    executor = MockExecutor(mock_info(GROUPS, **changes))
    return Engine(executor, executor.info, config, EOS), executor


def add(engine: Engine, name: str, prompt: list[int], **params: Any) -> None:
    sampling = SamplingParams(**{"temperature": 0.0, "ignore_eos": True, "max_tokens": 4, **params})
    engine.add(AddRequest(request_id=name, prompt_ids=prompt, params=sampling))


def finish(engine: Engine) -> list[Output]:
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    return outputs


# ---- the loop


def test_an_idle_engine_does_nothing() -> None:
    engine, executor = engine_of()
    assert not engine.has_work
    assert engine.step() == []
    assert executor.batches == []


@pytest.mark.parametrize(
    ("executor_can", "user_wants", "depth"),
    [(True, True, 2), (True, False, 1), (False, True, 1)],
)
def test_one_step_is_in_flight_while_the_next_is_built(
    executor_can: bool, user_wants: bool, depth: int
) -> None:
    engine, executor = engine_of(overlap=executor_can, config_overlap=user_wants)
    add(engine, "a", [1, 2, 3], max_tokens=9)
    outputs = finish(engine)
    assert executor.depth == depth
    assert len(outputs) == len(executor.batches) == 9


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_gives_each_request_what_the_oracle_gives_alone(
    shape: tuple[int, ...], lazy: bool
) -> None:
    info = world(4, shape, 100, 100)
    arrivals = [
        Arrival(i // 2, TOKENS[i % 2][: 10 * i + 3], SamplingParams(max_tokens=15, seed=i))
        for i in range(9)
    ]
    serve(info, EngineConfig(), arrivals, lazy)


def test_the_oracle_agrees_with_an_engine_that_serves_one_request_at_a_time() -> None:
    info = mock_info(GROUPS)
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=3, frequency_penalty=0.3)
    config = EngineConfig(prefix_cache=False, overlap=False)
    engine = Engine(MockExecutor(info), info, config, EOS)
    (heard,) = run(engine, [Arrival(0, TOKENS[0][:50], params)])
    assert heard.tokens == alone(TOKENS[0][:50], params, info, EOS, draw).tokens


def test_the_oracle_is_sensitive_to_every_token_of_the_context() -> None:
    info, params = mock_info(GROUPS), SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    text = TOKENS[0][:60]
    answers = {tuple(alone(text, params, info).tokens)}
    for i in range(60):
        other = [*text[:i], (text[i] + 1) % 32, *text[i + 1 :]]
        answers.add(tuple(alone(other, params, info).tokens))
    assert len(answers) == 61


def test_a_seed_means_the_same_whatever_else_is_in_the_batch() -> None:
    params = {"temperature": 1.0, "seed": 11, "max_tokens": 20}
    engine, _ = engine_of()
    add(engine, "a", TOKENS[0][:9], **params)
    lonely = [t for o in finish(engine) for t in o.token_ids]
    engine, _ = engine_of()
    for i in range(7):
        add(engine, str(i), TOKENS[1][: 5 * i + 1], temperature=1.3, seed=i, max_tokens=11)
    add(engine, "a", TOKENS[0][:9], **params)
    crowded = [t for o in finish(engine) if o.request_id == "a" for t in o.token_ids]
    assert crowded == lonely
    engine, _ = engine_of()
    add(engine, "a", TOKENS[0][:9], **{**params, "seed": 12})
    assert [t for o in finish(engine) for t in o.token_ids] != lonely


def test_sixteen_cold_requests_with_one_prefix_compute_it_once() -> None:
    groups = (group("full", 400, 16), group("window", 200, 16, window=40))
    shared = TOKENS[2][:1024]
    params = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
    arrivals = [Arrival(0, [*shared, i, 1, 2], params) for i in range(16)]
    for budget in (4096, 100):
        sized = mock_info(groups, max_context=1200, max_rows=16, max_step_tokens=budget)
        engine, executor, heard = serve(sized, EngineConfig(), arrivals)
        assert executor.computed == 1024 + 16 * (3 + 2)
        assert sorted(h.cached or 0 for h in heard) == [0] + [1024] * 15
        assert engine.stats().cached_tokens == 15 * 1024


# ---- messages


def test_cached_tokens_come_with_the_first_message_only() -> None:
    engine, _ = engine_of()
    add(engine, "a", TOKENS[0][:20])
    assert [o.cached_tokens for o in finish(engine)] == [0, None, None, None]
    add(engine, "b", TOKENS[0][:18])
    assert [o.cached_tokens for o in finish(engine)] == [16, None, None, None]


def test_logprobs_are_trimmed_to_what_each_row_asked_for() -> None:
    engine, _ = engine_of()
    for name, count in (("none", None), ("zero", 0), ("two", 2), ("five", 5)):
        add(engine, name, TOKENS[0][:7], logprobs=count, max_tokens=1)
    outputs = {o.request_id: o for o in finish(engine)}
    assert outputs["none"].logprobs is None
    for name, count in (("zero", 0), ("two", 2), ("five", 5)):
        (entry,) = outputs[name].logprobs or []
        assert entry.token_id == outputs[name].token_ids[0]
        assert len(entry.top_ids) == len(entry.top_logprobs) == count
        assert entry.top_logprobs == sorted(entry.top_logprobs, reverse=True)
        assert not count or (entry.top_ids[0], entry.top_logprobs[0]) == (
            entry.token_id,
            entry.logprob,
        )


@pytest.mark.parametrize("budget", [64, 10, 8])
def test_prompt_logprobs_come_once_and_complete_over_chunks(budget: int) -> None:
    engine, executor = engine_of(max_step_tokens=budget)
    prompt = TOKENS[0][:29]
    add(engine, "warm", prompt)
    finish(engine)
    add(engine, "a", prompt, prompt_logprobs=3, logprobs=1, max_tokens=3)
    outputs = finish(engine)
    assert [o.prompt_logprobs is not None for o in outputs] == [True, False, False]
    scores = outputs[0].prompt_logprobs or []
    assert scores[0] is None
    want = alone(prompt, SamplingParams(max_tokens=1), executor.info).prompt_logprobs
    rest = [entry for entry in scores if entry is not None]
    assert [entry.token_id for entry in rest] == prompt[1:]
    assert np.allclose([entry.logprob for entry in rest], want)
    assert all(len(entry.top_ids) == 3 for entry in rest)
    assert [len((o.logprobs or [])[0].top_ids) for o in outputs] == [1, 1, 1]
    assert outputs[0].cached_tokens == 0


def test_a_prompt_of_one_token_has_no_logprob() -> None:
    engine, _ = engine_of()
    add(engine, "a", [5], prompt_logprobs=1, max_tokens=1)
    assert finish(engine)[0].prompt_logprobs == [None]


def test_prompt_logprobs_survive_preemption() -> None:
    info = mock_info((group("full", 12, 4),), max_step_tokens=10, max_context=48)
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, prompt_logprobs=0)
    arrivals = [Arrival(0, TOKENS[i][:16], params) for i in range(3)]
    engine, _, _ = serve(info, EngineConfig(), arrivals)
    assert engine.stats().preemptions > 0


def test_messages_hold_plain_python_values() -> None:
    engine, _ = engine_of()
    add(engine, "a", TOKENS[0][:9], logprobs=2, prompt_logprobs=1)
    add(engine, "b", TOKENS[0][:9], temperature=1.0)
    outputs = [o for o in finish(engine) if o]
    sent = messages.encode(messages.Outputs(outputs=outputs))
    assert messages.decode_from_engine(sent) == messages.Outputs(outputs=outputs)
    assert messages.decode_from_engine(messages.encode(engine.stats())) == engine.stats()
    assert not _numpy_in(msgspec.to_builtins(outputs))


def _numpy_in(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_numpy_in, value.values()))
    if isinstance(value, list):
        return any(map(_numpy_in, value))
    return isinstance(value, np.generic | np.ndarray)


def test_the_load_snapshot_adds_up() -> None:
    engine, executor = engine_of()
    add(engine, "a", TOKENS[0][:20], max_tokens=3)
    add(engine, "b", TOKENS[0][:20], max_tokens=5)
    add(engine, "c", TOKENS[1][:20], max_tokens=5)
    engine.step()
    before = engine.stats()
    assert (before.running, before.waiting) == (3, 0)
    engine.abort(["c"])
    finish(engine)
    stats = engine.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    assert stats.finished == {"abort": 1, "length": 2}
    assert stats.prompt_tokens + stats.cached_tokens == 60
    assert stats.cached_tokens == 16
    assert stats.steps == len(executor.batches)
    assert stats.device_seconds == pytest.approx(0.001 * stats.steps)
    assert stats.step_seconds > 0
    for free, evictable, pinned, total in stats.pages.values():
        assert (free + evictable, pinned) == (total, 0)


# ---- the end


def test_an_abort_is_answered_by_the_next_step() -> None:
    engine, _ = engine_of()
    add(engine, "a", TOKENS[0][:9], max_tokens=50)
    engine.step()
    engine.abort(["a", "unknown"])
    assert engine.has_work
    assert [(o.request_id, o.finish_reason) for o in finish(engine)] == [("a", "abort")]
    assert not engine.has_work
    audit_empty(engine)
    add(engine, "a", TOKENS[0][:9])
    assert finish(engine)[-1].finish_reason == "length"


@pytest.mark.parametrize("failing", ["submit", "collect"])
def test_a_failing_step_ends_every_request_and_then_the_engine(failing: str) -> None:
    engine, executor = engine_of(max_rows=2)
    for name in "abc":
        add(engine, name, TOKENS[0][:9], max_tokens=50)
    engine.step()
    if failing == "collect":
        executor.fail_at = 1
    else:
        executor.submit = _fail  # type: ignore[method-assign]
    ends = [o for o in engine.step() if o.finish_reason]
    assert sorted(o.request_id for o in ends) == ["a", "b", "c"]
    for output in ends:
        assert output.finish_reason == "error"
        assert output.error is not None
        assert "the device is gone" in output.error.message
    assert engine.has_work  # until the death has been told
    with pytest.raises(EngineDied, match="the device is gone"):
        engine.step()
    assert not engine.has_work
    with pytest.raises(EngineDied):
        add(engine, "d", [1])
    engine.abort(["a"])
    assert engine.stats().finished == {"error": 3}
    engine.close()


def _fail(batch: StepBatch) -> None:
    raise RuntimeError("the device is gone")


@pytest.mark.parametrize(
    "change",
    [
        {"step": 99},
        {"token_ids": np.zeros((1, 1), np.int32)},
        {"token_ids": np.full((2, 1), 32, np.int32)},
        {"token_ids": np.full((2, 1), -7, np.int32)},
        {"logprobs": None},
        {"prompt_logprobs": ()},
    ],
)
def test_a_result_that_does_not_fit_its_step_is_never_delivered(change: Any) -> None:
    engine, executor = engine_of(overlap=False)
    collect = executor.collect

    def wrong() -> StepResult:
        result = collect()
        fields = {name: getattr(result, name) for name in StepResult.__dataclass_fields__}
        return StepResult(**{**fields, **change})

    executor.collect = wrong  # type: ignore[method-assign]
    for name in "ab":
        add(engine, name, TOKENS[0][:9], logprobs=1, prompt_logprobs=1)
    outputs = engine.step()
    assert sorted(o.request_id for o in outputs if o.finish_reason == "error") == ["a", "b"]
    assert not any(o.token_ids for o in outputs)


def test_what_came_before_a_failing_row_is_still_delivered() -> None:
    engine, executor = engine_of(overlap=False)
    collect = executor.collect

    def wrong() -> StepResult:
        result = collect()
        result.token_ids[1] = 32
        return result

    executor.collect = wrong  # type: ignore[method-assign]
    add(engine, "a", TOKENS[0][:9], max_tokens=1)
    add(engine, "b", TOKENS[1][:9])
    ends = {o.request_id: o.finish_reason for o in engine.step()}
    assert ends == {"a": "length", "b": "error"}


def test_a_refused_request_leaves_no_trace() -> None:
    engine, executor = engine_of()
    with pytest.raises(RequestError):
        add(engine, "a", [])
    assert not engine.has_work
    assert engine.stats().waiting == 0
    engine.close()
    engine.close()
    assert executor.closed
    with pytest.raises(EngineDied, match="closed"):
        engine.step()


def test_the_comparison_with_the_oracle_can_fail() -> None:
    info = mock_info(GROUPS)
    engine = Engine(MockExecutor(info), info, EngineConfig(), EOS)
    params = SamplingParams(max_tokens=4, temperature=0.0)
    heard = run(engine, [Arrival(0, [1, 2, 3], params)])
    with pytest.raises(Wrong):
        compare([Arrival(0, [1, 2, 4], params)], heard, info)


def test_the_engine_needs_no_tensor_framework() -> None:
    """In a fresh process in which the frameworks cannot be imported."""
    code = (
        "import sys\n"
        "for name in ('torch', 'mlx', 'triton', 'transformers'): sys.modules[name] = None\n"
        "import sixfold.common.engine\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
