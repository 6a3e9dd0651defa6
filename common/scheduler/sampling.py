"""The sampling parameters of a step's rows as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ...platforms.interface_kv import I32
from ...platforms.interface_step import SamplingArrays
from ..random import uniform
from .row import Row

Drafts = Sequence[tuple[int, ...]]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


class SamplingBuilder:
    """Builds `SamplingArrays`. While the rows of successive steps are the same and none has a
    parameter that depends on its history, only the draws are new."""

    def __init__(self) -> None:
        self._rows: list[Row] = []
        self._arrays: SamplingArrays | None = None
        self._seeds: I64 = np.empty(0, np.int64)
        self._draws = False

    def build(
        self, rows: list[Row], positions: I64, drafts: Drafts | None = None
    ) -> SamplingArrays:
        """positions (R,): the place in its sequence of the token that each row samples; where rows
        have drafts, of the first one. Rows with drafts have as many lines more."""
        if drafts is not None:
            return self._lines(rows, positions, drafts)
        if self._arrays is not None and rows == self._rows:
            if not self._draws:
                return self._arrays
            return replace(self._arrays, uniform=uniform(self._seeds, positions))
        self._seeds = np.array([row.params.seed for row in rows], np.int64)
        self._draws = any(row.params.temperature > 0 for row in rows)
        draws = uniform(self._seeds, positions) if self._draws else np.zeros(len(rows))
        arrays = sampling_arrays(rows, draws)
        stable = all(row.plain or not _changes(row) for row in rows)
        self._rows, self._arrays = (rows, arrays) if stable else ([], None)
        return arrays

    def _lines(self, rows: list[Row], positions: I64, drafts: Drafts) -> SamplingArrays:
        self._rows, self._arrays = [], None
        ahead = [own[:count] for own in drafts for count in range(len(own) + 1)]
        lines = [row for row, own in zip(rows, drafts, strict=True) for _ in range(len(own) + 1)]
        first = np.repeat(positions, [len(own) + 1 for own in drafts])
        seeds = np.array([row.params.seed for row in lines], np.int64)
        draws = uniform(seeds, first + np.array([len(before) for before in ahead], np.int64))
        return sampling_arrays(lines, draws, ahead)


def _changes(row: Row) -> bool:
    return row.penalised or row.must_go_on() or row.scores_prompt


def sampling_arrays(
    rows: Sequence[Row], draws: F64, drafts: Drafts | None = None
) -> SamplingArrays:
    """A line each. `drafts`: of each line, the tokens that are before it if they are right; a line
    counts only where they are, so that they are its history."""
    ahead = drafts or [()] * len(rows)
    params = [row.params for row in rows]
    bias = [
        row.bans if row.must_go_on(len(before)) else row.bias
        for row, before in zip(rows, ahead, strict=True)
    ]
    bias_start, bias_ids = _packed([ids for ids, _ in bias])
    values = [v for _, v in bias if len(v)]
    nothing = np.empty(0, np.int32)
    prompts = [r.tokens[: r.prompt_length] if r.penalised else nothing for r in rows]
    outputs = [
        _history(row, before) if row.penalised else nothing
        for row, before in zip(rows, ahead, strict=True)
    ]
    prompt_start, prompt_ids = _packed(prompts)
    output_start, output_ids = _packed(outputs)
    return SamplingArrays(
        temperature=np.array([p.temperature for p in params], np.float32),
        top_k=np.array([p.top_k for p in params], np.int32),
        top_p=np.array([p.top_p for p in params], np.float32),
        min_p=np.array([p.min_p for p in params], np.float32),
        repetition_penalty=np.array([p.repetition_penalty for p in params], np.float32),
        presence_penalty=np.array([p.presence_penalty for p in params], np.float32),
        frequency_penalty=np.array([p.frequency_penalty for p in params], np.float32),
        uniform=draws,
        logprobs=np.array([_logprobs(row) for row in rows], np.int32),
        bias_start=bias_start,
        bias_ids=bias_ids,
        bias_values=np.concatenate(values) if values else np.empty(0, np.float32),
        prompt_start=prompt_start,
        prompt_ids=prompt_ids,
        output_start=output_start,
        output_ids=output_ids,
    )


def _history(row: Row, drafts: tuple[int, ...]) -> I32:
    made = row.tokens[row.prompt_length : row.known]
    return np.concatenate((made, np.array(drafts, np.int32))) if drafts else made


def _logprobs(row: Row) -> int:
    wanted = -1 if row.params.logprobs is None else row.params.logprobs
    if row.scores_prompt and row.params.prompt_logprobs is not None:
        return max(wanted, row.params.prompt_logprobs)
    return wanted


def _packed(parts: list[I32]) -> tuple[I32, I32]:
    """Offsets (R+1,) and the concatenation."""
    start = np.zeros(len(parts) + 1, np.int32)
    np.cumsum([len(part) for part in parts], out=start[1:])
    filled = [part for part in parts if len(part)]
    return start, np.concatenate(filled) if filled else np.empty(0, np.int32)
