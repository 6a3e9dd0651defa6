"""Guards the scheduler, one behaviour per test: who runs in a step, with how many tokens and which
pages, who waits, who is preempted, and what the step's arrays say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.mock_executor import group
from support.scheduler_bench import EOS, TOKEN, Bench, lengths

from sixfold.common.errors import ContextLengthExceeded, QueueFull, RequestError
from sixfold.common.messages import AddRequest
from sixfold.common.random import uniform
from sixfold.common.sampling import SamplingParams
from sixfold.platforms.interface import Status, Support
from sixfold.platforms.interface_step import LAST_TOKEN, StepResult, Want

NAMES = ("low", "high")


# ---- steps


def test_a_prompt_is_computed_whole_and_then_token_by_token() -> None:
    bench = Bench()
    bench.add("a", 6)
    first = bench.step()
    assert first.token_ids.tolist() == [2, 3, 4, 5, 6, 7]
    assert (first.context_lens.tolist(), first.want.tolist()) == ([0], [Want.SAMPLE])
    assert np.count_nonzero(first.page_tables["full"]) == 2
    second = bench.step()
    assert (second.token_ids.tolist(), second.context_lens.tolist()) == ([TOKEN], [6])
    assert second.row_ids.tolist() == first.row_ids.tolist()
    assert second.step == first.step + 1


def test_the_next_step_is_built_before_the_last_is_collected() -> None:
    bench = Bench()
    bench.add("a", 6)
    bench.submit()
    second = bench.submit()
    assert second is not None
    assert (second.token_ids.tolist(), second.context_lens.tolist()) == ([LAST_TOKEN], [6])
    assert bench.submit() is None  # two are in flight
    bench.collect()
    third = bench.submit()
    assert third is not None
    assert (third.token_ids.tolist(), third.context_lens.tolist()) == ([LAST_TOKEN], [7])


def test_a_row_that_ended_in_the_step_before_is_ignored() -> None:
    bench = Bench()
    bench.add("a", 6)
    bench.submit()
    bench.submit()
    (end,) = bench.collect(EOS)
    assert (end.finish_reason, end.stop_token_id, end.token_ids) == ("stop", EOS, [])
    assert bench.collect() == []
    assert bench.submit() is None
    assert bench.scheduler.cache.pools[0].pinned == 0


def test_no_step_is_scheduled_beyond_the_last_token() -> None:
    bench = Bench()
    bench.add("a", 6, max_tokens=2)
    bench.submit()
    bench.submit()
    bench.collect()
    assert bench.submit() is None
    (end,) = bench.collect()
    assert (end.finish_reason, end.token_ids) == ("length", [TOKEN])


def test_decoding_rows_come_first_and_prompts_share_the_rest_of_the_budget() -> None:
    bench = Bench(max_step_tokens=16)
    bench.add("a", 4)
    bench.step()
    bench.add("b", 20, first=5)
    bench.add("c", 20, first=9)
    assert lengths(bench.step()) == [1, 12]  # cut at a page boundary; 3 tokens are no page for c
    assert lengths(bench.step()) == [1, 8, 4]
    assert lengths(bench.step()) == [1, 1, 12]


def test_a_budget_below_a_page_still_gets_on() -> None:
    bench = Bench(group("full", 8, 16), max_step_tokens=5, max_rows=2)
    bench.add("a", 20)
    assert [lengths(bench.step()) for _ in range(5)] == [[5], [5], [5], [5], [1]]


def test_no_more_rows_run_than_there_are_places() -> None:
    bench = Bench(max_rows=2)
    for name in "abc":
        bench.add(name, 4, first=ord(name))
    assert bench.step().rows == 2
    assert (bench.scheduler.running, bench.scheduler.waiting) == (2, 1)


def test_higher_priority_then_earlier_arrival_starts_first() -> None:
    bench = Bench(max_rows=1)
    for name, priority in (("a", 0), ("b", 2), ("c", 2), ("d", 1)):
        bench.add(name, 4, priority, max_tokens=1)
    order = [o.request_id for _ in range(4) for o in (bench.step(), bench.outputs[-1])[1:]]
    assert order == ["b", "c", "d", "a"]


def test_prompts_and_decoding_take_turns_where_they_do_not_mix() -> None:
    bench = Bench(mixed_steps=False, max_step_tokens=8)
    bench.add("a", 4)
    assert lengths(bench.step()) == [4]
    bench.add("b", 16, first=9)
    kinds = [lengths(bench.step()) for _ in range(5)]
    assert kinds == [[1], [8], [1], [8], [1, 1]]


# ---- prefixes


def test_sixteen_cold_requests_with_one_prefix_compute_it_once_in_one_step() -> None:
    bench = Bench(group("full", 200, 16), max_rows=16, max_step_tokens=2048, max_context=400)
    shared = [i % 30 + 1 for i in range(256)]
    for i in range(16):
        params = SamplingParams(max_tokens=2, temperature=0.0)
        ids = [*shared, i + 1, 3, 4]
        bench.scheduler.add(AddRequest(request_id=str(i), prompt_ids=ids, params=params))
    batch = bench.step()
    assert lengths(batch) == [259] + [3] * 15
    assert batch.context_lens.tolist() == [0] + [256] * 15
    table = batch.page_tables["full"]
    assert (table[:, :16] == table[0, :16]).all()
    assert len(set(table[:, 16].tolist())) == 16
    assert [o.cached_tokens for o in bench.outputs] == [0] + [256] * 15
    assert bench.counters.prompt_tokens == 256 + 16 * 3
    assert bench.counters.cached_tokens == 15 * 256


def test_a_prompt_under_way_takes_over_what_another_row_computes() -> None:
    """Two equal prompts in small chunks: the second waits for the first, and no page is computed
    twice, even where the second has begun one."""
    bench = Bench(max_step_tokens=7)
    bench.add("a", 22)
    bench.add("b", 22)
    assert [lengths(bench.step()) for _ in range(4)] == [[4], [4], [4], [4]]
    assert lengths(bench.step()) == [6]
    assert lengths(bench.step()) == [1, 2]
    assert bench.counters.cached_tokens == 20


def test_an_answer_is_found_again_by_the_next_turn() -> None:
    bench = Bench()
    bench.add("a", 5, max_tokens=8)
    while bench.scheduler.running or bench.scheduler.waiting:
        bench.step()
    ids = [2, 3, 4, 5, 6, *[TOKEN] * 8, 9]
    params = SamplingParams(max_tokens=1, temperature=0.0)
    bench.scheduler.add(AddRequest(request_id="b", prompt_ids=ids, params=params))
    assert lengths(bench.step()) == [2]  # the last token of an answer is never computed
    assert bench.outputs[-1].cached_tokens == 12


def test_a_prompt_that_is_scored_is_computed_in_full_but_can_be_shared() -> None:
    bench = Bench()
    bench.add("a", 9)
    bench.step()
    bench.add("b", 9, prompt_logprobs=2)
    batch = bench.submit()
    assert batch is not None
    assert lengths(batch) == [1, 9]
    assert batch.want.tolist() == [Want.SAMPLE, Want.SAMPLE | Want.PROMPT_LOGPROBS]
    assert batch.prompt_targets is not None
    assert batch.prompt_targets.tolist() == [-1, 3, 4, 5, 6, 7, 8, 9, 10, -1]
    assert batch.sampling.logprobs.tolist() == [-1, 2]
    rows = bench.scheduler._running
    tables = bench.scheduler.cache.tables[0]
    assert (
        tables[rows[0].sequence.handle, :2].tolist() == tables[rows[1].sequence.handle, :2].tolist()
    )


def test_without_the_prefix_cache_every_prompt_is_computed() -> None:
    bench = Bench(prefix_cache=False)
    for name in "ab":
        bench.add(name, 9)
    assert lengths(bench.step()) == [9, 9]
    bench.scheduler.abort(["a", "b"])
    assert bench.scheduler.cache.pools[0].free == 64


# ---- pages


def test_pages_behind_the_window_are_given_back_while_a_row_runs() -> None:
    bench = Bench(group("full", 64, 4), group("window", 8, 4, window=6), max_context=200)
    bench.add("a", 20, max_tokens=100)
    for _ in range(60):
        batch = bench.step()
        assert np.count_nonzero(batch.page_tables["window"]) <= 5
        assert bench.scheduler.cache.pools[1].pinned <= 5
    length = int(batch.context_lens[0]) + 1
    held = np.flatnonzero(batch.page_tables["window"][0])
    assert held.tolist() == list(range((length - 6) // 4, (length - 1) // 4 + 1))


def test_a_chunk_fits_the_window_pages_there_are() -> None:
    bench = Bench(group("full", 64, 4), group("window", 5, 4, window=6))
    bench.add("a", 40, max_tokens=2)
    # 5 pages at first; after 20 tokens 2 of them are still in the window.
    assert [lengths(bench.step()) for _ in range(3)] == [[20], [12], [8]]


def test_the_last_row_of_the_lowest_priority_gives_way() -> None:
    bench = Bench(group("full", 8, 4), prefix_cache=False, overlap=False)
    bench.add("high", 7, priority=1, max_tokens=20)
    bench.add("old", 7, first=5, max_tokens=9)
    bench.add("new", 7, first=9, max_tokens=9)
    names = set()
    while bench.counters.preemptions == 0:
        names = set(bench.running())
        bench.step()
    assert names == {"high", "old", "new"}
    assert bench.running() == ["high", "old"]
    while bench.scheduler.running or bench.scheduler.waiting:
        bench.step()
    assert {o.request_id for o in bench.outputs if o.finish_reason} == names
    for name, count in (("high", 20), ("old", 9), ("new", 9)):
        assert sum(len(o.token_ids) for o in bench.outputs if o.request_id == name) == count
    assert bench.scheduler.cache.pools[0].free == 8


def test_nobody_is_preempted_while_a_step_is_in_flight() -> None:
    bench = Bench(group("full", 5, 4), prefix_cache=False)
    bench.add("a", 7, max_tokens=10)
    bench.add("b", 7, first=9, max_tokens=10)
    bench.submit()
    while (batch := bench.submit()) is not None:
        bench.collect()
    assert bench.counters.preemptions == 0
    assert bench.scheduler.in_flight == 1
    bench.collect()
    batch = bench.submit()
    assert batch is not None
    assert bench.counters.preemptions == 1
    assert bench.running() == ["a"]


def test_a_preempted_row_goes_on_from_its_own_cached_prefix() -> None:
    bench = Bench(group("full", 6, 4))
    bench.add("a", 8, max_tokens=9)
    bench.add("b", 8, first=9, max_tokens=9)
    while bench.counters.preemptions == 0:
        bench.step()
    prompt_tokens = bench.counters.prompt_tokens
    while bench.scheduler.running or bench.scheduler.waiting:
        bench.step()
    assert bench.counters.prompt_tokens < prompt_tokens + 8
    assert [o.cached_tokens for o in bench.outputs if o.cached_tokens is not None] == [0, 0]


def test_a_new_row_waits_until_its_prompt_has_room() -> None:
    bench = Bench(group("full", 8, 4), prefix_cache=False)
    bench.add("a", 12, max_tokens=4)
    bench.step()
    bench.add("b", 16, first=9, max_tokens=1)
    bench.step()
    assert bench.running() == ["a"]
    while "a" in bench.running():
        assert bench.running() == ["a"]
        bench.step()
    bench.step()
    assert (bench.outputs[-1].request_id, bench.outputs[-1].finish_reason) == ("b", "length")


def test_prompts_go_on_when_the_decoding_rows_had_to_give_way() -> None:
    """A row of high priority prefills beside one that decodes; only turns, and a tight cache."""
    bench = Bench(group("full", 10, 1), prefix_cache=False, mixed_steps=False, max_step_tokens=2)
    bench.add("low", 1, max_tokens=9)
    bench.step()
    bench.add("high", 6, priority=1, first=9, max_tokens=4)
    while bench.scheduler.running or bench.scheduler.waiting:
        bench.step()
    counts = {n: sum(len(o.token_ids) for o in bench.outputs if o.request_id == n) for n in NAMES}
    assert counts == {"low": 9, "high": 4}
    assert bench.counters.preemptions > 0


# ---- the end of requests


@pytest.mark.parametrize("in_flight", [0, 1, 2])
def test_abort_frees_everything_at_any_time(in_flight: int) -> None:
    bench = Bench()
    bench.add("a", 9)
    bench.add("b", 9, first=9)
    for _ in range(in_flight):
        bench.submit()
    (end,) = bench.scheduler.abort(["a", "a", "unknown"])
    assert (end.request_id, end.finish_reason) == ("a", "abort")
    bench.scheduler.abort(["b"])
    assert bench.scheduler.cache.pools[0].pinned == 0
    assert (bench.scheduler.waiting, bench.scheduler.running) == (0, 0)
    for _ in range(in_flight):
        assert bench.collect() == []
    assert bench.submit() is None
    assert bench.counters.finished == {"abort": 2}


def test_a_handle_is_reused_while_the_aborted_rows_step_is_in_flight() -> None:
    bench = Bench(max_rows=1)
    bench.add("a", 5)
    first = bench.submit()
    bench.scheduler.abort(["a"])
    bench.add("b", 5, first=9)
    second = bench.submit()
    assert first is not None
    assert second is not None
    assert first.row_ids.tolist() == second.row_ids.tolist()
    assert LAST_TOKEN not in second.token_ids
    assert bench.collect() == []
    assert [o.request_id for o in bench.collect()] == ["b"]


def test_stop_ids_end_a_request_and_ignore_eos_does_not() -> None:
    bench = Bench()
    bench.add("a", 5, stop_token_ids=(9,))
    bench.add("b", 5, ignore_eos=True)
    bench.step(EOS)
    ends = {o.request_id: (o.finish_reason, o.token_ids, o.stop_token_id) for o in bench.outputs}
    assert ends == {"a": ("stop", [], EOS), "b": (None, [EOS], None)}
    bench.add("c", 5, stop_token_ids=(9,))
    bench.step(9)
    assert bench.outputs[-1].stop_token_id == 9


def test_a_row_without_an_answer_fails_alone() -> None:
    bench = Bench()
    bench.add("a", 5)
    bench.add("b", 5, first=9)
    batch = bench.submit()
    assert batch is not None
    ids = np.array([[-1], [TOKEN]], np.int32)
    failed, going = bench.scheduler.apply(StepResult(batch.step, ids, np.array([0, 1], np.int32)))
    assert (failed.request_id, failed.finish_reason) == ("a", "error")
    assert failed.error is not None
    assert failed.error.code == "no_token"
    assert (going.request_id, going.finish_reason) == ("b", None)


def test_without_max_tokens_a_request_goes_to_the_context_limit() -> None:
    bench = Bench(max_context=20)
    bench.add("a", 5, max_tokens=None)
    while bench.scheduler.running or bench.scheduler.waiting:
        bench.step()
    assert sum(len(o.token_ids) for o in bench.outputs) == 15
    assert bench.outputs[-1].finish_reason == "length"


# ---- refusals


def test_the_queue_is_bounded() -> None:
    bench = Bench(max_rows=2, max_queue=1)
    for name in "abc":
        bench.add(name, 4)
    with pytest.raises(QueueFull, match="1 waiting"):
        bench.add("d", 4)
    bench.step()
    with pytest.raises(QueueFull):
        bench.add("d", 4)
    bench.scheduler.abort(["c"])
    bench.add("d", 4)


def test_too_long_a_request_is_refused_with_the_context_limit() -> None:
    bench = Bench(max_context=20)
    with pytest.raises(ContextLengthExceeded, match="maximum context length is 20 tokens"):
        bench.add("a", 15, max_tokens=6)
    with pytest.raises(ContextLengthExceeded):
        bench.add("a", 20, max_tokens=None)
    bench.add("a", 15, max_tokens=5)


def test_a_request_that_never_fits_the_cache_is_refused_with_the_numbers() -> None:
    bench = Bench(group("full", 5, 4), max_context=100)
    with pytest.raises(RequestError, match=r"cache for 21 tokens \(14 in the prompt\).* holds 20"):
        bench.add("a", 14, max_tokens=8)
    bench.add("a", 14, max_tokens=7)
    bench.add("b", 14, max_tokens=None)
    while bench.scheduler.running or bench.scheduler.waiting:
        bench.step()
    assert {o.finish_reason for o in bench.outputs} == {None, "length"}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt_ids": []}, "prompt"),
        ({"prompt_ids": [1, 32]}, "prompt"),
        ({"prompt_ids": [-1]}, "prompt"),
        ({"prompt_ids": [2**70]}, "prompt"),
        ({"params": SamplingParams(temperature=3.0)}, "temperature"),
        ({"params": SamplingParams(logprobs=21)}, "logprobs"),
        ({"params": SamplingParams(stop_token_ids=(32,))}, "stop_token_ids"),
        ({"request_id": "open"}, "request_id"),
    ],
)
def test_an_invalid_request_is_refused_by_its_parameter(change: Any, param: str) -> None:
    bench = Bench()
    bench.add("open", 3)
    good = {"request_id": "a", "prompt_ids": [1], "params": SamplingParams(max_tokens=1)}
    bench.scheduler.add(AddRequest(**good))
    with pytest.raises(RequestError) as caught:
        bench.scheduler.add(AddRequest(**{**good, "request_id": "b", **change}))
    assert caught.value.param == param
    assert bench.scheduler.waiting == 2


@pytest.mark.parametrize(
    ("feature", "params", "param"),
    [
        ("logprobs", {"logprobs": 0}, "logprobs"),
        ("prompt_logprobs", {"prompt_logprobs": 1}, "prompt_logprobs"),
        ("penalties", {"presence_penalty": 0.5}, "presence_penalty"),
        ("penalties", {"repetition_penalty": 1.1}, "repetition_penalty"),
        ("logit_bias", {"logit_bias": {3: 1.0}}, "logit_bias"),
        ("logit_bias", {"min_tokens": 2}, "min_tokens"),
        ("top_p", {"top_p": 0.5}, "top_p"),
    ],
)
def test_what_the_platform_cannot_do_is_refused(feature: str, params: Any, param: str) -> None:
    bench = Bench(features={feature: Support(Status.NO, "no kernel for it.")})
    with pytest.raises(RequestError, match=f"'mock' does not support {param}: no kernel") as caught:
        bench.add("a", 3, **params)
    assert (caught.value.param, caught.value.code) == (param, "unsupported_parameter")
    bench.add("a", 3)


def test_unverified_features_are_served() -> None:
    bench = Bench(features={"logprobs": Support(Status.UNVERIFIED, "not seen yet")})
    bench.add("a", 3, logprobs=1)


# ---- sampling arrays


def test_each_draw_is_of_the_seed_and_the_place_of_the_token() -> None:
    bench = Bench()
    bench.add("a", 6, temperature=1.0, seed=5)
    bench.add("b", 3, first=9, temperature=1.0, seed=-9)
    bench.add("greedy", 3, first=15)
    for made in range(3):
        draws = bench.step().sampling.uniform
        want = uniform(np.array([5, -9, 0]), np.array([6, 3, 3]) + made)
        assert draws[:2].tolist() == want[:2].tolist()


def test_the_arrays_of_equal_rows_are_kept_and_only_the_draw_is_new() -> None:
    bench = Bench()
    bench.add("a", 6, temperature=0.7, seed=5)
    bench.step()
    one, two = bench.step().sampling, bench.step().sampling
    assert one.temperature is two.temperature
    assert one.uniform is not two.uniform
    bench.add("b", 3)
    assert len(bench.step().sampling.temperature) == 2


def test_end_tokens_are_banned_until_min_tokens() -> None:
    bench = Bench()
    bench.add("a", 6, min_tokens=2, stop_token_ids=(9,), logit_bias={9: 5.0, 4: 1.0})
    bench.submit()
    seen = []
    for _ in range(3):  # with a step in flight: its token counts
        batch = bench.submit()
        assert batch is not None
        seen.append(dict(zip(batch.sampling.bias_ids, batch.sampling.bias_values, strict=True)))
        bench.collect()
    assert seen == [{9: -np.inf, 4: 1.0, EOS: -np.inf}, {9: 5.0, 4: 1.0}, {9: 5.0, 4: 1.0}]


def test_penalties_come_with_the_history_but_without_the_token_in_flight() -> None:
    bench = Bench()
    bench.add("a", 3, frequency_penalty=0.5)
    bench.add("b", 3, first=9)
    bench.submit()
    bench.submit()
    bench.collect()
    batch = bench.submit()
    assert batch is not None
    s = batch.sampling
    assert (s.prompt_start.tolist(), s.prompt_ids.tolist()) == ([0, 3, 3], [2, 3, 4])
    assert (s.output_start.tolist(), s.output_ids.tolist()) == ([0, 1, 1], [TOKEN])
    assert batch.token_ids.tolist() == [LAST_TOKEN, LAST_TOKEN]
