"""Hyper-connections: N residual streams, mixed around every sub-layer by matrices that each token
makes for itself (Zhu et al. 2024), kept near doubly stochastic by Sinkhorn steps (Xie et al. 2025,
"mHC"); as DeepSeek-V4 uses them.

Parameters of one sub-layer, all float32: fn ((2 + N) * N, N * D), base ((2 + N) * N,), scale (3,).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...platforms.interface_kernels import Case, Op
from .contract import F32, REDUCTION, around_one, normal
from .norm import rms_norm

F64 = NDArray[np.float64]

FLOAT32 = frozenset({"fn", "base", "scale", "post", "mixing"})
"""Whatever the dtype of the streams: mixing in 16 bits drifts over the layers."""


def mhc_pre(
    streams: F32, fn: F32, base: F32, scale: F32, iterations: int, eps: float, norm_eps: float
) -> tuple[F32, F32, F32]:
    """streams (T, N, D) -> the sub-layer's input (T, D), post (T, N) and mixing (T, N, N) float32.

    m = fn @ flat / sqrt(mean(flat^2) + norm_eps) of a token's streams side by side, cut into N, N
    and N * N numbers. pre = sigmoid(scale[0] * m + base) + eps, post = 2 * sigmoid(scale[1] * m +
    base), mixing = softmax over the last axis of scale[2] * m + base, plus eps; then columns are
    divided by their sums + eps, and after that iterations - 1 times rows and columns. The input is
    the sum of streams weighted by pre.
    """
    count = streams.shape[1]
    flat = streams.reshape(len(streams), count * streams.shape[2]).astype(np.float64)
    made = _products(flat, fn, norm_eps)
    pre = _sigmoid(made[:, :count] * scale[0] + base[:count]) + eps
    post = 2.0 * _sigmoid(made[:, count : 2 * count] * scale[1] + base[count : 2 * count])
    mixing = (made[:, 2 * count :] * scale[2] + base[2 * count :]).reshape(len(flat), count, count)
    mixing = _softmax(mixing) + eps
    mixing = mixing / (mixing.sum(axis=-2, keepdims=True) + eps)
    for _ in range(iterations - 1):
        mixing = mixing / (mixing.sum(axis=-1, keepdims=True) + eps)
        mixing = mixing / (mixing.sum(axis=-2, keepdims=True) + eps)
    entered = np.einsum("tn,tnd->td", pre, streams.astype(np.float64))
    return entered.astype(np.float32), post.astype(np.float32), mixing.astype(np.float32)


def mhc_post(made: F32, streams: F32, post: F32, mixing: F32) -> F32:
    """made (T, D) by the sub-layer, streams (T, N, D) from before it, post (T, N), mixing (T, N, N)
    -> the new streams: stream j is post[j] * made + the sum over i of mixing[i, j] * stream i. The
    old stream is the first index of `mixing`."""
    mixed = np.einsum("tij,tid->tjd", mixing.astype(np.float64), streams.astype(np.float64))
    return (mixed + post[:, :, None].astype(np.float64) * made[:, None, :]).astype(np.float32)


def mhc_post_pre(
    made: F32,
    streams: F32,
    post: F32,
    mixing: F32,
    fn: F32,
    base: F32,
    scale: F32,
    norm_weight: F32,
    iterations: int,
    eps: float,
    norm_eps: float,
) -> tuple[F32, F32, F32, F32]:
    """`mhc_post` of one sub-layer, `mhc_pre` of the next with its parameters, and `rms_norm` of
    what that gives, with norm_weight (D,) and norm_eps -> new streams, normed input, new post, new
    mixing. The new streams are rounded to their dtype before anything reads them, and may not lie
    in the memory of the old ones."""
    streams = mhc_post(made, streams, post, mixing)
    entered, post, mixing = mhc_pre(streams, fn, base, scale, iterations, eps, norm_eps)
    return streams, rms_norm(entered, norm_weight, norm_eps), post, mixing


def mhc_head(streams: F32, fn: F32, base: F32, scale: F32, eps: float, norm_eps: float) -> F32:
    """streams (T, N, D), fn (N, N * D), base (N,), scale (1,) -> (T, D): the sum of streams
    weighted by sigmoid(scale * m + base) + eps, m as in `mhc_pre`."""
    flat = streams.reshape(len(streams), fn.shape[1]).astype(np.float64)
    weights = _sigmoid(_products(flat, fn, norm_eps) * scale[0] + base) + eps
    return np.einsum("tn,tnd->td", weights, streams.astype(np.float64)).astype(np.float32)


def _products(flat: F64, fn: F32, norm_eps: float) -> F64:
    root = np.sqrt((flat * flat).mean(axis=-1, keepdims=True) + norm_eps)
    return np.asarray(flat @ fn.astype(np.float64).T / root)


def _sigmoid(x: F64) -> F64:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def _softmax(x: F64) -> F64:
    raised = np.exp(x - x.max(axis=-1, keepdims=True, initial=-np.inf))
    return np.asarray(raised / raised.sum(axis=-1, keepdims=True))


SHAPES = [
    ("one_token", 1, 4, 64),
    ("odd_width", 5, 4, 33),
    ("two_streams", 3, 2, 24),
    ("beyond_a_tile", 37, 4, 40),
    ("published_width", 2, 4, 4096),
    ("no_tokens", 0, 4, 16),
]


def _mixer(rng: np.random.Generator, count: int, width: int) -> dict[str, Any]:
    outputs = (2 + count) * count
    return {
        "fn": normal(rng, outputs, count * width, scale=(count * width) ** -0.5),
        "base": normal(rng, outputs, scale=0.5),
        "scale": rng.uniform(0.5, 1.0, 3).astype(np.float32),
        "iterations": 20,
        "eps": 1e-6,
        "norm_eps": 1e-6,
    }


def _finished(rng: np.random.Generator, tokens: int, count: int) -> dict[str, Any]:
    """What an earlier `mhc_pre` left: doubly stochastic, and far from symmetric."""
    mixing = np.exp(2.0 * rng.standard_normal((tokens, count, count)))
    for axis in (-1, -2) * 10:
        mixing = mixing / mixing.sum(axis=axis, keepdims=True)
    post = rng.uniform(0.1, 1.9, (tokens, count)).astype(np.float32)
    return {"post": post, "mixing": mixing.astype(np.float32)}


def pre_cases(rng: np.random.Generator) -> Iterable[Case]:
    for name, tokens, count, width in SHAPES:
        yield Case(
            name, {"streams": normal(rng, tokens, count, width), **_mixer(rng, count, width)}
        )
    # Steps that have not converged tell the order of rows and columns.
    for iterations in (1, 2):
        mixer = {**_mixer(rng, 4, 16), "scale": np.array([1, 1, 6], np.float32)}
        given = {"streams": normal(rng, 4, 4, 16), **mixer, "iterations": iterations}
        yield Case(f"sinkhorn_{iterations}", given)
    mixer = _mixer(rng, 4, 16)
    yield Case("zeros_meet_eps", {"streams": np.zeros((2, 4, 16), np.float32), **mixer})
    yield Case("large", {"streams": normal(rng, 2, 4, 16, scale=3e3), **mixer})
    saturated = {**mixer, "base": mixer["base"] * np.float32(200)}
    yield Case("saturated", {"streams": normal(rng, 3, 4, 16), **saturated})


def post_cases(rng: np.random.Generator) -> Iterable[Case]:
    for name, tokens, count, width in SHAPES:
        made = {"made": normal(rng, tokens, width), "streams": normal(rng, tokens, count, width)}
        yield Case(name, {**made, **_finished(rng, tokens, count)})


def post_pre_cases(rng: np.random.Generator) -> Iterable[Case]:
    for case in post_cases(rng):
        _, count, width = case.args["streams"].shape
        norm = {"norm_weight": around_one(rng, width)}
        yield Case(case.name, {**case.args, **_mixer(rng, count, width), **norm})


def head_cases(rng: np.random.Generator) -> Iterable[Case]:
    for name, tokens, count, width in SHAPES:
        mixer = _mixer(rng, count, width)
        mixer = {"fn": mixer["fn"][:count], "base": mixer["base"][:count]}
        scale = rng.uniform(0.5, 1.0, 1).astype(np.float32)
        given = {"streams": normal(rng, tokens, count, width), **mixer, "scale": scale}
        yield Case(name, {**given, "eps": 1e-6, "norm_eps": 1e-6})


def dims(args: Mapping[str, Any]) -> dict[str, int]:
    """Static sizes of a call site."""
    _, count, width = args["streams"].shape
    return {"streams": count, "width": width}


OPS = (
    Op("mhc_pre", mhc_pre, pre_cases, REDUCTION, float32=FLOAT32, dims=dims),
    Op("mhc_post", mhc_post, post_cases, REDUCTION, float32=FLOAT32, dims=dims),
    Op(
        "mhc_post_pre",
        mhc_post_pre,
        post_pre_cases,
        REDUCTION,
        parts=("mhc_post", "mhc_pre", "rms_norm"),
        float32=FLOAT32,
        dims=dims,
    ),
    Op("mhc_head", mhc_head, head_cases, REDUCTION, float32=FLOAT32, dims=dims),
)
