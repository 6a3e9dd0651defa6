"""Contract: who guesses, and what is made of guesses on either side of the step: n-grams of the
text so far; the lines of a step with drafts; how many of a row's samples count; and that an
executor which counts otherwise is caught."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sixfold.common.errors import EngineDied
from sixfold.common.ops.sample_cases import sampling_arrays
from sixfold.common.scheduler.delivery import StepReader
from sixfold.common.speculative.drafters import NgramDrafter
from sixfold.platforms.interface_step import StepBatch, StepResult, Want
from sixfold.platforms.torch_runtime.sample_lines import SampleLines


def row(tokens: list[int], room: int = 0) -> Any:
    return SimpleNamespace(tokens=np.array(tokens + [7] * room, np.int32), known=len(tokens))


@pytest.mark.parametrize(
    ("tokens", "most", "wanted"),
    [
        ([1, 2, 3, 4, 5, 9, 1, 2, 3], 2, (4, 5)),
        ([1, 2, 3, 4, 5, 9, 1, 2, 3], 9, (4, 5, 9, 1, 2, 3)),  # no more than there is
        ([1, 2, 8, 8, 1, 2, 6, 6, 1, 2], 2, (6, 6)),  # where it stood last
        ([5, 1, 2, 3, 8, 4, 1, 2, 3, 9, 5, 1, 2, 3], 1, (8,)),  # the longer run counts more
        ([4, 4, 4, 4, 4], 3, (4,)),  # a run of its own: what follows is known up to here
        ([4, 4, 4, 4, 4, 4, 4, 4, 4], 3, (4, 4, 4)),
        ([1, 2, 1, 3, 1], 3, ()),  # one token alone is no sign
        ([3], 3, ()),
        ([3, 3], 3, ()),
    ],
)
def test_ngrams(tokens: list[int], most: int, wanted: tuple[int, ...]) -> None:
    assert NgramDrafter().propose(row(tokens), most) == wanted
    assert NgramDrafter().propose(row(tokens, room=5), most) == wanted


def batch(counts: list[int], drafts: list[int] | None, samples: list[int]) -> StepBatch:
    """Tokens are 0, 1, 2, … over the whole step."""
    rows = len(counts)
    lines = rows + sum(drafts or [])
    return StepBatch(
        step=3,
        row_ids=np.arange(rows, dtype=np.int32),
        token_ids=np.arange(sum(counts), dtype=np.int32),
        query_start=np.concatenate(([0], np.cumsum(counts))).astype(np.int32),
        context_lens=np.zeros(rows, np.int32),
        page_tables={},
        want=np.array([Want.SAMPLE if s else 0 for s in samples], np.uint8),
        sampling=sampling_arrays([{}] * lines),
        draft_counts=None if drafts is None else np.array(drafts, np.int32),
    )


def test_lines_of_a_step() -> None:
    """Rows of 4 tokens with 2 drafts, 3 without sampling, 1 alone, 3 with 2 drafts."""
    step = batch([4, 3, 1, 3], [2, 0, 0, 2], [1, 0, 1, 1])
    made = SampleLines.of(step)
    assert made.places.tolist() == [1, 2, 3, 7, 8, 9, 10]
    assert made.lines.tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert made.owners.tolist() == [0, 0, 0, 2, 3, 3, 3]
    # Row 0: the draft 2 is right, 3 is not. Row 3: both are right.
    tokens, accepted, last = made.results(step, np.array([2, 99, 50, 60, 9, 10, 11]))
    assert tokens.tolist() == [[2, 99, -1], [-1] * 3, [60, -1, -1], [9, 10, 11]]
    assert accepted.tolist() == [2, 0, 1, 3]
    assert last.tolist() == [1, 3, 6]


def test_nothing_to_sample_ends_a_row_where_it_is() -> None:
    step = batch([3, 3, 1], [2, 2, 0], [1, 1, 1])
    made = SampleLines.of(step)
    tokens, accepted, _ = made.results(step, np.array([1, -1, 5, -1, 5, 5, -1]))
    assert accepted.tolist() == [1, 0, 0]
    result = StepResult(3, tokens, accepted)
    reader = StepReader(step, result, 64)
    assert reader.tokens(0, (1, 2)) == [1, None]
    assert reader.tokens(1, (4, 5)) == [None]
    assert reader.tokens(2, ()) == [None]


def test_steps_without_drafts_have_a_line_for_each_row() -> None:
    step = batch([2, 1, 3], None, [1, 0, 1])
    made = SampleLines.of(step)
    assert made.places.tolist() == [1, 5]
    tokens, accepted, _ = made.results(step, np.array([40, 41]))
    assert tokens.tolist() == [[40], [-1], [41]]
    assert accepted.tolist() == [1, 0, 1]
    empty = batch([2], None, [0])
    tokens, accepted, _ = SampleLines.of(empty).results(empty, np.empty(0, np.int32))
    assert (tokens.tolist(), accepted.tolist()) == ([[-1]], [0])


@pytest.mark.parametrize(
    ("tokens", "accepted"), [([7, 8, 9], 2), ([1, 7, 9], 3), ([1, 2, 3], 4), ([1, 2, 99], 3)]
)
def test_an_executor_that_counts_otherwise_is_caught(tokens: list[int], accepted: int) -> None:
    """Of drafts 1, 2: a sample behind a wrong draft, more than there are, an id that is none."""
    step = batch([3], [2], [1])
    result = StepResult(3, np.array([tokens], np.int32), np.array([accepted], np.int32))
    with pytest.raises(EngineDied):
        StepReader(step, result, 64).tokens(0, (1, 2))
