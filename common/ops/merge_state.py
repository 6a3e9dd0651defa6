"""Joining two partial results of one attention, each over a part of the keys, by their
log-sum-exps (Rabe and Staats 2021; Dao et al. 2022, section 3.1; FlashDecoding)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from ...platforms.interface_kernels import Case, Op, Tolerance
from .contract import F32, POINTWISE, normal

TOLERANCE = {**POINTWISE, "float32": Tolerance(5e-6, 5e-6)}


def merge_state(first: F32, first_lse: F32, second: F32, second_lse: F32) -> tuple[F32, F32]:
    """first, second (T, heads, D) softmax-weighted means of values over disjoint sets of keys,
    their log-sum-exps (T, heads) float32, natural logarithm -> the mean over both and its
    log-sum-exp, float32.

    A part whose log-sum-exp is -inf saw no key and counts nothing, whatever it holds, NaN
    included; two such parts give zeros and -inf. The results do not depend on the order of parts.
    """
    lses = np.stack([first_lse, second_lse]).astype(np.float64)
    most = lses.max(axis=0)
    weights = np.exp(lses - np.where(np.isneginf(most), 0.0, most))
    total = weights.sum(axis=0)
    seen = np.isneginf(lses)[..., None]
    parts = np.where(seen, 0.0, np.stack([first, second]).astype(np.float64))
    joined = (weights[..., None] * parts).sum(axis=0)
    mean = np.divide(
        joined, total[..., None], out=np.zeros_like(joined), where=total[..., None] > 0
    )
    with np.errstate(divide="ignore"):
        lse = np.where(total > 0, most + np.log(total), -np.inf)
    return mean.astype(np.float32), lse.astype(np.float32)


def cases(rng: np.random.Generator) -> Iterable[Case]:
    for name, rows, heads, dim in [
        ("one_row", 1, 3, 64),
        ("odd", 5, 2, 80),
        ("one_element", 2, 1, 1),
        ("no_rows", 0, 4, 16),
        ("wide", 3, 2, 512),
    ]:
        lses = normal(rng, rows, heads, scale=3.0), normal(rng, rows, heads, scale=3.0)
        yield _case(rng, name, dim, *lses)
    near, far = (np.array([x], np.float32) for x in ((0.0, 5.0, -80.0), (100.0, 5.0, -200.0)))
    yield _case(rng, "far_apart_and_equal", 16, near, far)
    yield _case(rng, "large", 16, near + np.float32(1e4), near + np.float32(1e4) - 1)
    none = np.array([[-np.inf, 1.0, -np.inf]], np.float32)
    other = np.array([[2.0, -np.inf, -np.inf]], np.float32)
    case = _case(rng, "parts_that_saw_nothing", 16, none, other)
    holds = {name: case.args[name].copy() for name in ("first", "second")}
    holds["first"][0, [0, 2]], holds["second"][0, 1] = np.nan, np.inf
    yield Case(case.name, {**case.args, **holds})


def _case(
    rng: np.random.Generator, name: str, dim: int, first: NDArray[np.float32], second: F32
) -> Case:
    return Case(
        name,
        {
            "first": normal(rng, *first.shape, dim),
            "first_lse": first,
            "second": normal(rng, *first.shape, dim),
            "second_lse": second,
        },
    )


OPS = (
    Op(
        "merge_state",
        merge_state,
        cases,
        TOLERANCE,
        float32=frozenset({"first_lse", "second_lse"}),
    ),
)
