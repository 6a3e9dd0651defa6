"""Guards how a step is cut for MLX: in order, nothing lost, padding bounded, long rows alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sixfold.common.ops.sample_cases import sampling_arrays
from sixfold.platforms.interface_step import StepBatch
from sixfold.platforms.mlx.step_plan import LONG, pieces


def step(counts: list[int]) -> StepBatch:
    rows = len(counts)
    return StepBatch(
        step=0,
        row_ids=np.arange(rows, dtype=np.int32),
        token_ids=np.arange(sum(counts), dtype=np.int32),
        query_start=np.concatenate(([0], np.cumsum(counts))).astype(np.int32),
        context_lens=np.zeros(rows, np.int32),
        page_tables={},
        want=np.zeros(rows, np.uint8),
        sampling=sampling_arrays([{}] * rows),
    )


@pytest.mark.parametrize(
    ("counts", "runs"),
    [
        ([1], [1]),
        ([1, 1, 1], [3]),
        ([1, 1, 300], [2, 1]),
        ([300, 300, 300], [1, 1, 1]),
        ([LONG - 1, LONG - 1, LONG], [2, 1]),
        ([1, 30, 31, 29, 1], [5]),
        ([1, 1, 1, 30], [3, 1]),
    ],
)
def test_rows_of_like_length_run_together(counts: list[int], runs: list[int]) -> None:
    assert [rows.last - rows.first for rows in pieces(step(counts))] == runs


@given(st.lists(st.integers(1, 2 * LONG), min_size=1, max_size=20))
def test_any_step_is_cut_in_order_with_bounded_padding(counts: list[int]) -> None:
    found = pieces(step(counts))
    joined = np.concatenate([rows.tokens for rows in found])
    np.testing.assert_array_equal(joined, np.arange(sum(counts)))
    for rows in found:
        size = rows.last - rows.first
        assert size * rows.width <= 2 * int(rows.counts.sum())
        assert size == 1 or rows.width < LONG
