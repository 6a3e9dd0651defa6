"""Root-mean-square norm (Zhang and Sennrich 2019, equation 4), alone and after a residual add, and
layer norm."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ...platforms.interface_kernels import Case, Op, Tolerance
from .contract import F32, POINTWISE, around_one, normal

LAYER_TOLERANCE = {**POINTWISE, "float32": Tolerance(2e-5, 1e-5), "bfloat16": Tolerance(2e-2, 2e-2)}
"""The difference to the mean loses digits where the mean is large."""
TOLERANCE = {**POINTWISE, "float32": Tolerance(1e-5, 1e-5), "bfloat16": Tolerance(2e-2, 2e-2)}


def rms_norm(x: F32, weight: F32, eps: float) -> F32:
    """x (..., H), weight (H,) -> x / sqrt(mean(x^2) + eps) * weight, statistics over the last axis.

    Statistics in float32 or wider whatever the dtype of x.
    """
    wide = x.astype(np.float64)
    scale = 1.0 / np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * scale * weight).astype(np.float32)


def add_rms_norm(x: F32, residual: F32, weight: F32, eps: float) -> tuple[F32, F32]:
    """x, residual (T, H) -> (rms_norm(x + residual), x + residual). The sum is rounded to the
    dtype of x before it is normed. Kernels may reuse the memory of neither argument."""
    total = (x.astype(np.float64) + residual).astype(np.float32)
    return rms_norm(total, weight, eps), total


def rms_norm_cases(rng: np.random.Generator) -> Iterable[Case]:
    for name, shape, eps in [
        ("one_row", (1, 576), 1e-5),
        ("odd", (5, 33), 1e-6),
        ("per_head_64", (3, 9, 64), 1e-6),
        ("per_head_80", (2, 4, 80), 1e-5),
        ("per_head_256", (2, 1, 256), 1e-6),
        ("no_rows", (0, 16), 1e-6),
    ]:
        yield Case(
            name, {"x": normal(rng, *shape), "weight": around_one(rng, shape[-1]), "eps": eps}
        )
    zeros = np.zeros((2, 32), np.float32)
    yield Case("zeros_meet_eps", {"x": zeros, "weight": around_one(rng, 32), "eps": 1e-6})
    small = normal(rng, 2, 32, scale=1e-3)
    yield Case("small_feels_eps", {"x": small, "weight": around_one(rng, 32), "eps": 1e-5})
    large = normal(rng, 2, 64, scale=3e3)
    yield Case("large", {"x": large, "weight": around_one(rng, 64), "eps": 1e-6})


def add_rms_norm_cases(rng: np.random.Generator) -> Iterable[Case]:
    for name, rows, width in [("one_row", 1, 576), ("odd", 7, 33), ("no_rows", 0, 16)]:
        yield Case(
            name,
            {
                "x": normal(rng, rows, width),
                "residual": normal(rng, rows, width, scale=4.0),
                "weight": around_one(rng, width),
                "eps": 1e-5,
            },
        )


def layer_norm(x: F32, weight: F32, bias: F32 | None, eps: float) -> F32:
    """x (..., H), weight (H,), bias (H,) or None -> (x - mean) / sqrt(variance + eps) * weight +
    bias over the last axis (Ba, Kiros and Hinton 2016, equation 4); the variance is of all H
    numbers. Statistics in float32 or wider whatever the dtype of x."""
    wide = x.astype(np.float64)
    apart = wide - wide.mean(axis=-1, keepdims=True)
    scale = 1.0 / np.sqrt((apart * apart).mean(axis=-1, keepdims=True) + eps)
    result = apart * scale * weight
    return (result if bias is None else result + bias).astype(np.float32)


def layer_norm_cases(rng: np.random.Generator) -> Iterable[Case]:
    for case in rms_norm_cases(rng):
        bias = normal(rng, len(case.args["weight"]))
        yield Case(case.name, {**case.args, "bias": bias})
    x = normal(rng, 3, 48) + np.float32(50.0)  # a mean far above the spread
    yield Case("far_mean", {"x": x, "weight": around_one(rng, 48), "bias": None, "eps": 1e-5})
    equal = np.full((2, 16), 3.0, np.float32)
    yield Case("equal", {"x": equal, "weight": around_one(rng, 16), "bias": None, "eps": 1e-5})


def width(args: Mapping[str, Any]) -> dict[str, int]:
    return {"width": len(args["weight"])}


OPS = (
    Op("layer_norm", layer_norm, layer_norm_cases, LAYER_TOLERANCE, dims=width),
    Op("rms_norm", rms_norm, rms_norm_cases, TOLERANCE, dims=width),
    Op(
        "add_rms_norm", add_rms_norm, add_rms_norm_cases, TOLERANCE, parts=("rms_norm",), dims=width
    ),
)
