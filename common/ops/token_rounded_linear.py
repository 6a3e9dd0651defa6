"""The linear layer of checkpoints that ask for activations of eight bits too: a scale per token,
found as the token comes (W8A8; Yao et al. 2022, "ZeroQuant", section 4.2).

That rounding is part of the meaning. A kernel may round in smaller groups, or not at all: it is
then nearer to the model before it was quantised, and within the same tolerance.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ...platforms.interface_kernels import Case, Op
from ..checkpoint.quantised_rows import QuantisedRows
from .contract import F32, normal
from .dense import linear, linear_dims
from .quantised_linear import TOLERANCE, cases_of_form, int8_channel, rows_values

MOST = 127
"""Largest whole number of an activation; -128 is not used."""


def round_tokens(x: F32) -> F32:
    """x (T, K) as eight bits with a scale per row, of which the largest number is 127. A row of
    zeros stays one; one with a NaN or an infinity is NaN altogether."""
    most = np.abs(x).max(axis=-1, keepdims=True, initial=0.0)
    step = np.where(most > 0, most, 1.0) / np.float32(MOST)
    with np.errstate(invalid="ignore"):
        rounded = np.rint(x / step) * step
    lost = ~np.isfinite(most)
    return np.where(lost, np.nan, rounded).astype(np.float32)


def token_rounded_linear(x: F32, weight: QuantisedRows, bias: F32 | None = None) -> F32:
    """x (T, K), weight (N, K) with a scale per output, bias (N,) or None -> (T, N)."""
    return linear(round_tokens(x), rows_values(weight), bias)


def token_cases(rng: np.random.Generator) -> Iterable[Case]:
    yield from cases_of_form(int8_channel)(rng)
    weight = int8_channel(rng, 24, 96)
    x = normal(rng, 5, 96)
    x[1] = 0.0
    args = {"weight": weight, "bias": normal(rng, 24)}
    yield Case("a_row_of_zeros", {"x": x, **args})
    apart = normal(rng, 4, 96) * np.array([[1.0], [0.01], [1.0], [0.05]], np.float32)
    yield Case("rows_of_unlike_size", {"x": apart, **args})


OPS = (
    Op(
        "linear",
        token_rounded_linear,
        token_cases,
        TOLERANCE,
        weights="int8_token",
        dims=linear_dims,
    ),
)
