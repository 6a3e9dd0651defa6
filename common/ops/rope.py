"""Rotary position embedding (Su et al. 2021, section 3.4) on half-split pairs, alone and after a
per-head norm of q and k."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ...platforms.interface_kernels import Case, Op, Tolerance
from .contract import F32, I64, POINTWISE, around_one, normal
from .norm import rms_norm

TOLERANCE = {**POINTWISE, "float32": Tolerance(1e-5, 1e-5), "bfloat16": Tolerance(4e-2, 2e-2)}


ANGLES = frozenset({"cos", "sin"})
"""Angles are float32 in every model."""


def _rotate(x: F32, cos: F32, sin: F32) -> F32:
    half = cos.shape[-1]
    first, second = x[..., :half].astype(np.float64), x[..., half : 2 * half].astype(np.float64)
    c, s = cos[:, None, :], sin[:, None, :]
    turned = np.concatenate([first * c - second * s, second * c + first * s], axis=-1)
    return np.concatenate([turned.astype(np.float32), x[..., 2 * half :]], axis=-1)


def rope(q: F32, k: F32, cos: F32, sin: F32) -> tuple[F32, F32]:
    """q (T, Hq, D), k (T, Hk, D), cos and sin (T, R/2) float32 -> q and k turned.

    Dimensions i and i + R/2 form a pair for i < R/2; dimensions from R on pass unchanged (R <= D).
    """
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def rope_angles(positions: I64, inverse: F32, scale: float) -> tuple[F32, F32]:
    """positions (T,), inverse frequencies (R/2,) float32 -> scale * cos and scale * sin of their
    products (T, R/2). The products are rounded to float32, as models are trained."""
    angles = positions.astype(np.float32)[:, None] * inverse
    wide = angles.astype(np.float64)
    return (np.cos(wide) * scale).astype(np.float32), (np.sin(wide) * scale).astype(np.float32)


def rope_angles_cases(rng: np.random.Generator) -> Iterable[Case]:
    for name, tokens, half, scale in [
        ("one", 1, 32, 1.0),
        ("odd", 7, 5, 1.0),
        ("scaled", 9, 64, 1.3),
        ("no_tokens", 0, 8, 1.0),
    ]:
        inverse = (10000.0 ** (-np.arange(half) / half)).astype(np.float32)
        positions = rng.integers(0, 100_000, tokens)
        yield Case(name, {"positions": positions, "inverse": inverse, "scale": scale})
    rates = (500_000.0 ** (-np.arange(32) / 32)).astype(np.float32)
    rows = np.concatenate([start + np.arange(3) for start in (0, 4095, 17, 131_069)])
    yield Case("rows_of_unlike_offsets", {"positions": rows, "inverse": rates, "scale": 1.0})
    for name, inverse, scale in [
        ("linear_scaling", rates / np.float32(8), 1.0),
        ("low_frequencies_stretched", _stretched(rates, 8.0), 1.0),
        ("yarn", _stretched(rates, 32.0), 0.1 * float(np.log(32.0)) + 1.0),
    ]:
        positions = rng.integers(0, 131_072, 11)
        yield Case(name, {"positions": positions, "inverse": inverse, "scale": scale})


def _stretched(rates: F32, factor: float) -> F32:
    """Llama 3's and YaRN's kind of scaling (Peng et al. 2023, section 3.2): slow rates are divided
    by `factor`, fast ones stay, those between are mixed."""
    turns = rates * 8192 / (2 * np.pi)  # in the context of training
    kept = np.clip((turns - 1) / 31, 0, 1)
    return (rates / factor * (1 - kept) + rates * kept).astype(np.float32)


def qk_norm_rope(
    q: F32, k: F32, q_weight: F32, k_weight: F32, eps: float, cos: F32, sin: F32
) -> tuple[F32, F32]:
    """RMS norm of every head of q and k (weights (D,)), then `rope`."""
    return rope(rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps), cos, sin)


def _angles(rng: np.random.Generator, tokens: int, rotary: int) -> tuple[F32, F32]:
    positions = rng.integers(0, 5000, tokens)
    rates = 10000.0 ** (-np.arange(rotary // 2) / (rotary // 2))
    angles = positions[:, None] * rates
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


SHAPES = [
    ("one_row_64", 1, 9, 3, 64, 64),
    ("dim_16", 5, 4, 2, 16, 16),
    ("dim_80", 3, 2, 2, 80, 80),
    ("dim_128_mqa", 4, 6, 1, 128, 128),
    ("dim_192", 3, 2, 1, 192, 192),
    ("dim_256", 2, 4, 1, 256, 256),
    ("partial", 3, 4, 2, 64, 16),
    ("partial_quarter_of_256", 2, 2, 1, 256, 64),
    ("partial_odd_rest", 5, 3, 3, 37, 10),
    ("no_tokens", 0, 4, 2, 32, 32),
]
"""dim_192: a report of heads turned wrongly at that size (vllm-ascend 12723); partial: of a whole
head turned where a part is to be (vllm-ascend 6060)."""


def rope_cases(rng: np.random.Generator) -> Iterable[Case]:
    for name, tokens, heads, kv_heads, dim, rotary in SHAPES:
        cos, sin = _angles(rng, tokens, rotary)
        q, k = normal(rng, tokens, heads, dim), normal(rng, tokens, kv_heads, dim)
        yield Case(name, {"q": q, "k": k, "cos": cos, "sin": sin})
    cos, sin = (angles * np.float32(1.35) for angles in _angles(rng, 6, 32))
    q, k = normal(rng, 6, 4, 32), normal(rng, 6, 2, 32)
    yield Case("scaled_angles", {"q": q, "k": k, "cos": cos, "sin": sin})


def qk_norm_rope_cases(rng: np.random.Generator) -> Iterable[Case]:
    for name, tokens, heads, kv_heads, dim, rotary in SHAPES:
        cos, sin = _angles(rng, tokens, rotary)
        yield Case(
            name,
            {
                "q": normal(rng, tokens, heads, dim, scale=3.0),
                "k": normal(rng, tokens, kv_heads, dim, scale=0.2),
                "q_weight": around_one(rng, dim),
                "k_weight": around_one(rng, dim),
                "eps": 1e-6,
                "cos": cos,
                "sin": sin,
            },
        )


def head_dims(args: Mapping[str, Any]) -> dict[str, int]:
    _, heads, dim = args["q"].shape
    return {"heads": heads, "kv_heads": args["k"].shape[1], "head_dim": dim}


OPS = (
    Op(
        "rope_angles",
        rope_angles,
        rope_angles_cases,
        dict.fromkeys(POINTWISE, POINTWISE["float32"]),
        float32=frozenset({"inverse"}),
        dims=lambda args: {"half": len(args["inverse"])},
    ),
    Op("rope", rope, rope_cases, TOLERANCE, float32=ANGLES, dims=head_dims),
    Op(
        "qk_norm_rope",
        qk_norm_rope,
        qk_norm_rope_cases,
        TOLERANCE,
        parts=("rms_norm", "rope"),
        float32=ANGLES,
        dims=head_dims,
    ),
)
