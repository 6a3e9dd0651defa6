"""Which of a step's tokens are sampled behind, line by line of its sampling arrays, and how many of
a row's samples count. Pure numpy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..interface_step import StepBatch, Want

I32 = NDArray[np.int32]
I64 = NDArray[np.int64]

_SAMPLE = int(Want.SAMPLE)  # numpy is slow with flags of an enumeration


def spans(first: NDArray[np.integer], counts: NDArray[np.integer]) -> I64:
    """`counts[i]` numbers from `first[i]` on, for each i, one after the other."""
    start = np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(first, counts) + np.arange(int(counts.sum())) - start


@dataclass(frozen=True, slots=True)
class SampleLines:
    """Of the rows of a step that sample, in order; L lines."""

    rows: I64  # (S,) the rows
    counts: I64  # (S,) lines of each
    owners: I64  # (L,) the row of each line
    lines: I64  # (L,) the lines among all of the step's
    places: I64  # (L,) the step's tokens whose logits they take

    @classmethod
    def of(cls, batch: StepBatch) -> SampleLines:
        rows = (batch.want & _SAMPLE).nonzero()[0]
        if batch.draft_counts is None:  # most steps: one line a row, with few calls
            last = batch.query_start[rows + 1].astype(np.int64) - 1
            return cls(rows, np.ones(len(rows), np.int64), rows, rows, last)
        start = batch.line_start.astype(np.int64)
        counts = (start[1:] - start[:-1])[rows]
        ends = batch.query_start[rows + 1].astype(np.int64)
        owners = np.repeat(rows, counts)
        return cls(rows, counts, owners, spans(start[rows], counts), spans(ends - counts, counts))

    def results(self, batch: StepBatch, sampled: NDArray[np.integer]) -> tuple[I32, I32, I64]:
        """sampled (L,) -> `token_ids` and `accepted` of StepResult, and of each of `rows` the line,
        counted here, that it goes on from."""
        if batch.draft_counts is None:
            tokens = np.full((batch.rows, 1), -1, np.int32)
            accepted = np.zeros(batch.rows, np.int32)
            tokens[self.rows, 0] = sampled
            accepted[self.rows] = sampled >= 0
            return tokens, accepted, np.arange(len(self.rows))
        width = int(self.counts.max(initial=1))
        tokens = np.full((batch.rows, width), -1, np.int32)
        accepted = np.zeros(batch.rows, np.int32)
        first = np.cumsum(self.counts) - self.counts
        counting = np.ones(len(self.rows), np.int64)
        for i in np.flatnonzero(self.counts > 1).tolist():
            own = slice(int(first[i]), int(first[i] + self.counts[i]))
            drafts = batch.token_ids[self.places[own][1:]]
            wrong = np.flatnonzero(sampled[own][:-1] != drafts)
            counting[i] = wrong[0] + 1 if len(wrong) else self.counts[i]
        for place in range(int(counting.max(initial=1))):
            some = counting > place
            tokens[self.rows[some], place] = sampled[first[some] + place]
        accepted[self.rows] = counting - (sampled[first + counting - 1] < 0)
        return tokens, accepted, first + counting - 1
