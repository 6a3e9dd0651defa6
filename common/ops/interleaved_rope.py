"""Rotary position embedding (Su et al. 2021) on neighbouring pairs of the last channels, as
DeepSeek-V4 turns queries, keys, compressed entries, and results back; with the ops around it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ...platforms.interface_kernels import Case, Op
from .contract import F32, REDUCTION, around_one, normal
from .norm import rms_norm
from .rope import ANGLES, TOLERANCE


def interleaved_rope(x: F32, cos: F32, sin: F32, inverse: bool = False) -> F32:
    """x (T, H, D), cos and sin (T, R/2) float32 -> x turned: of the last R channels, 2i and 2i + 1
    form a pair; the others pass unchanged. `inverse` turns back."""
    rotary = 2 * cos.shape[-1]
    turning = x[..., x.shape[-1] - rotary :].astype(np.float64)
    even, odd = turning[..., 0::2], turning[..., 1::2]
    c = cos[:, None, :].astype(np.float64)
    s = sin[:, None, :].astype(np.float64) * (-1.0 if inverse else 1.0)
    turned = np.stack([even * c - odd * s, odd * c + even * s], axis=-1)
    turned = turned.reshape(turning.shape).astype(np.float32)
    return np.concatenate([x[..., : x.shape[-1] - rotary], turned], axis=-1)


def shared_kv_norm_rope(
    q: F32, kv: F32, kv_weight: F32, eps: float, cos: F32, sin: F32
) -> tuple[F32, F32]:
    """q (T, H, D), kv (T, D) that is key and value of all heads, kv_weight (D,) -> q, every head
    normed without a weight, and kv, normed with it; both turned by `interleaved_rope`."""
    heads = rms_norm(q, np.ones(q.shape[-1], np.float32), eps)
    turned = interleaved_rope(rms_norm(kv, kv_weight, eps)[:, None], cos, sin)
    return interleaved_rope(heads, cos, sin), turned[:, 0]


def grouped_linear(x: F32, weight: F32) -> F32:
    """x (T, G * K), weight (G, N, K) -> (T, G * N): each group of channels times its own matrix."""
    groups, outputs, inputs = weight.shape
    parts = x.reshape(len(x), groups, inputs).astype(np.float64)
    made = np.einsum("tgk,gnk->tgn", parts, weight.astype(np.float64))
    return made.reshape(len(x), groups * outputs).astype(np.float32)


def inverse_rope_grouped_linear(x: F32, cos: F32, sin: F32, weight: F32) -> F32:
    """x (T, H, D), turned back by `interleaved_rope`, then its H * D channels by `grouped_linear`
    with weight (G, N, H * D / G): groups of neighbouring heads."""
    turned = interleaved_rope(x, cos, sin, inverse=True)
    return grouped_linear(turned.reshape(len(x), x.shape[1] * x.shape[2]), weight)


SHAPES = [
    ("one_token", 1, 4, 32, 8),
    ("all_channels", 3, 2, 16, 16),
    ("odd_rest", 5, 3, 37, 10),
    ("published_head", 2, 4, 512, 64),
    ("no_tokens", 0, 4, 16, 8),
]


def _angles(rng: np.random.Generator, tokens: int, rotary: int) -> dict[str, F32]:
    rates = 160_000.0 ** (-np.arange(rotary // 2) / (rotary // 2))
    angles = rng.integers(0, 5000, tokens)[:, None] * rates
    return {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}


def rope_cases(rng: np.random.Generator) -> Iterable[Case]:
    for name, tokens, heads, dim, rotary in SHAPES:
        for inverse in (False, True):
            given = {"x": normal(rng, tokens, heads, dim), **_angles(rng, tokens, rotary)}
            yield Case(f"{name}_back" if inverse else name, {**given, "inverse": inverse})


def norm_cases(rng: np.random.Generator) -> Iterable[Case]:
    for name, tokens, heads, dim, rotary in SHAPES:
        yield Case(
            name,
            {
                "q": normal(rng, tokens, heads, dim, scale=3.0),
                "kv": normal(rng, tokens, dim, scale=0.2),
                "kv_weight": around_one(rng, dim),
                "eps": 1e-6,
                **_angles(rng, tokens, rotary),
            },
        )


GROUPED = [
    ("one_group", 2, 1, 8, 24),
    ("odd", 5, 3, 7, 33),
    ("many", 33, 4, 16, 64),
    ("no_tokens", 0, 2, 8, 16),
]


def grouped_cases(rng: np.random.Generator) -> Iterable[Case]:
    for name, tokens, groups, outputs, inputs in GROUPED:
        weight = normal(rng, groups, outputs, inputs, scale=inputs**-0.5)
        yield Case(name, {"x": normal(rng, tokens, groups * inputs), "weight": weight})


def inverse_cases(rng: np.random.Generator) -> Iterable[Case]:
    for name, tokens, heads, dim, rotary in SHAPES:
        groups = 2 if heads % 2 == 0 else heads
        inputs = heads * dim // groups
        yield Case(
            name,
            {
                "x": normal(rng, tokens, heads, dim),
                **_angles(rng, tokens, rotary),
                "weight": normal(rng, groups, 11, inputs, scale=inputs**-0.5),
            },
        )


def head_dims(args: Mapping[str, Any]) -> dict[str, int]:
    _, heads, dim = args["q" if "q" in args else "x"].shape
    return {"heads": heads, "head_dim": dim, "rotary": 2 * args["cos"].shape[-1]}


def grouped_dims(args: Mapping[str, Any]) -> dict[str, int]:
    groups, n, k = args["weight"].shape
    return {"groups": groups, "n": n, "k": k}


OPS = (
    Op(
        "interleaved_rope",
        interleaved_rope,
        rope_cases,
        TOLERANCE,
        float32=ANGLES,
        dims=head_dims,
    ),
    Op(
        "shared_kv_norm_rope",
        shared_kv_norm_rope,
        norm_cases,
        TOLERANCE,
        parts=("rms_norm", "interleaved_rope"),
        float32=ANGLES,
        dims=head_dims,
    ),
    Op("grouped_linear", grouped_linear, grouped_cases, REDUCTION, dims=grouped_dims),
    Op(
        "inverse_rope_grouped_linear",
        inverse_rope_grouped_linear,
        inverse_cases,
        REDUCTION,
        parts=("interleaved_rope", "grouped_linear"),
        float32=ANGLES,
        dims=lambda args: {**head_dims(args), **grouped_dims(args)},
    ),
)
