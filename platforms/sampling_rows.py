"""Picking rows out of SamplingArrays."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from .interface_step import SamplingArrays

PER_ROW = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "uniform",
    "logprobs",
)
RAGGED = {
    "bias_start": ("bias_ids", "bias_values"),
    "prompt_start": ("prompt_ids",),
    "output_start": ("output_ids",),
}


def select_rows(sampling: SamplingArrays, rows: NDArray[np.intp]) -> SamplingArrays:
    """The sampling arrays of `rows` (ascending), the same object when that is all of them."""
    if len(rows) == len(sampling.temperature):
        return sampling
    changed = {name: getattr(sampling, name)[rows] for name in PER_ROW}
    for start_name, value_names in RAGGED.items():
        start = getattr(sampling, start_name)
        lengths = np.diff(start)
        keep = np.zeros(len(lengths), bool)
        keep[rows] = True
        kept = np.repeat(keep, lengths)
        changed[start_name] = np.concatenate(([0], np.cumsum(lengths[rows]))).astype(start.dtype)
        for name in value_names:
            changed[name] = getattr(sampling, name)[kept]
    return replace(sampling, **changed)


def no_sampling(rows: int) -> SamplingArrays:
    """Arrays of rows that ask for nothing."""
    floats, ints = np.zeros(rows, np.float32), np.zeros(rows, np.int32)
    start, no_ids = np.zeros(rows + 1, np.int32), np.zeros(0, np.int32)
    return SamplingArrays(
        temperature=floats,
        top_k=ints,
        top_p=floats + 1,
        min_p=floats,
        repetition_penalty=floats + 1,
        presence_penalty=floats,
        frequency_penalty=floats,
        uniform=np.zeros(rows),
        logprobs=ints - 1,
        bias_start=start,
        bias_ids=no_ids,
        bias_values=np.zeros(0, np.float32),
        prompt_start=start,
        prompt_ids=no_ids,
        output_start=start,
        output_ids=no_ids,
    )
