"""Guards the draw of captured steps: filters are replayed from reserved buffers, a row that
wants what is not recorded is left to the sampler, and buffers that a plan does not reach show."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.graph_stand_in import CannotRecord, Recording, poison

from sixfold.common.ops import OPS
from sixfold.common.ops.sample_cases import sampling_arrays
from sixfold.platforms.interface_step import StepBatch, Want
from sixfold.platforms.torch_runtime.captured_draw import CapturedDraw, DrawPlan, plan_draw
from sixfold.platforms.torch_runtime.sampler import draw

ROWS, WIDTH, VOCAB = 6, 16, 97
DRAWN: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.9},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.6, "min_p": 0.02},
]


def batch(rows: list[dict[str, Any]], **changes: Any) -> StepBatch:
    n = len(rows)
    made = StepBatch(
        step=0,
        row_ids=np.arange(n, dtype=np.int32),
        token_ids=np.zeros(n, np.int32),
        query_start=np.arange(n + 1, dtype=np.int32),
        context_lens=np.zeros(n, np.int32),
        page_tables={},
        want=np.full(n, Want.SAMPLE, np.uint8),
        sampling=sampling_arrays(rows),
    )
    return replace(made, **changes)


@pytest.fixture
def head() -> torch.Tensor:
    return torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(0))


def captured(head: torch.Tensor) -> CapturedDraw:
    def tokens(hidden: torch.Tensor, *asked: Any) -> torch.Tensor:
        return draw(hidden @ head.T, *asked)

    made = CapturedDraw(tokens, torch.zeros(ROWS, WIDTH))
    made.record(Recording)
    return made


def hidden_of(rows: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


def wanted(head: torch.Tensor, hidden: torch.Tensor, step: StepBatch) -> Any:
    return OPS["sample"].reference((hidden @ head.T).numpy(), step.sampling)


def plan_of(step: StepBatch, room: int = ROWS) -> DrawPlan:
    plan = plan_draw(step, room)
    assert plan is not None
    return plan


def test_replays_give_what_the_reference_gives(head: torch.Tensor) -> None:
    made, rng, filters = captured(head), np.random.default_rng(3), set()
    for seed in range(12):
        count = int(rng.integers(1, ROWS + 1))
        rows = [{**DRAWN[i], "uniform": rng.random()} for i in rng.integers(0, 4, count)]
        step, hidden = batch(rows), hidden_of(count, seed)
        for tensor in (made.hidden, made.floats, made.ints):
            poison(tensor)
        plan = plan_of(step)
        filters.add(plan.filtered)
        np.testing.assert_array_equal(made.run(plan, hidden).numpy(), wanted(head, hidden, step))
    assert filters == {False, True}


def test_greedy_rows_with_filters_need_no_sort() -> None:
    rows = [{"temperature": 0.0, "top_k": 3, "top_p": 0.5}, {"temperature": 1.0}]
    assert not plan_of(batch(rows)).filtered
    assert plan_of(batch([*rows, {"temperature": 1.0, "min_p": 0.1}])).filtered


@pytest.mark.parametrize(
    "step",
    [
        batch([{"temperature": 0.0, "bias": {3: -np.inf}}]),
        batch([{}, {"repetition_penalty": 1.1}]),
        batch([{"presence_penalty": 0.1}]),
        batch([{"frequency_penalty": 0.1}]),
        batch([{"logprobs": 0}]),
        batch([{}], grammar_mask=np.zeros((1, 4), np.uint32)),
        batch([{}], draft_counts=np.zeros(1, np.int32)),
        batch([{}, {}], want=np.array([Want.SAMPLE, Want.NOTHING], np.uint8)),
    ],
    ids="bias repetition presence frequency logprobs grammar drafts no_sample".split(),
)
def test_what_is_not_recorded_is_left_to_the_sampler(step: StepBatch) -> None:
    assert plan_draw(step, ROWS) is None


def test_a_plan_that_does_not_reach_the_buffers_shows(head: torch.Tensor) -> None:
    class Forgets(CapturedDraw):
        def run(self, plan: DrawPlan, hidden: torch.Tensor) -> torch.Tensor:
            self.hidden[: len(hidden)].copy_(hidden)
            return self.works[plan.filtered]()[: len(hidden)]

    made = captured(head)
    made.__class__ = Forgets
    step, hidden = batch([{"temperature": 2.0, "uniform": 0.9}] * ROWS), hidden_of(ROWS, 1)
    assert made.run(plan_of(step), hidden).tolist() != wanted(head, hidden, step).tolist()


def test_a_recording_that_differs_stops_the_load(head: torch.Tensor) -> None:
    made = CapturedDraw(lambda hidden, *asked: hidden.argmax(-1), torch.zeros(ROWS, WIDTH))
    with pytest.raises(RuntimeError, match=r"draw of 6 rows differs .* --graphs off"):
        made.record(lambda work: lambda: work() + 1)


def test_a_draw_that_a_graph_cannot_hold_is_refused() -> None:
    def reads(hidden: torch.Tensor, temperature: torch.Tensor, *asked: Any) -> torch.Tensor:
        return hidden.argmax(-1) + int(temperature.max())

    with pytest.raises(CannotRecord, match="reads a device value"):
        CapturedDraw(reads, torch.zeros(ROWS, WIDTH)).record(Recording)
