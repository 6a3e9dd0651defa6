"""Attention without a mask inside segments of a packed sequence, as vision towers have it: every
patch of an image sees all patches of that image (Dosovitskiy et al. 2021; softmax(q k^T) v of
Vaswani et al. 2017, equation 1)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from ...platforms.interface_kernels import Case, Op
from .attention import TOLERANCE
from .contract import F32, normal


def segment_attention(q: F32, k: F32, v: F32, starts: tuple[int, ...], scale: float) -> F32:
    """q, k, v (T, H, D) -> (T, H, D). Segment s has the tokens starts[s] to starts[s + 1] - 1, and
    starts (S + 1,), on the host, goes from 0 to T without falling; a segment may be empty. A token
    sees all tokens of its segment and no other, whatever those hold."""
    result = np.zeros(q.shape, np.float64)
    wide = [x.astype(np.float64) for x in (q, k, v)]
    for begin, end in pairwise(starts):
        if begin == end:
            continue
        queries, keys, values = (x[begin:end] for x in wide)
        logits = np.einsum("qhd,khd->hqk", queries, keys) * scale
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        result[begin:end] = np.einsum("hqk,khd->qhd", weights, values)
    return result.astype(np.float32)


def cases(rng: np.random.Generator) -> Iterable[Case]:
    for name, lengths, heads, dim in [
        ("one_token", (1,), 2, 16),
        ("one_image", (16,), 2, 16),
        ("equal_images", (12, 12, 12), 3, 32),
        ("unlike_images", (4, 40, 1, 24), 4, 72),
        ("an_empty_one", (8, 0, 5), 2, 80),
        ("more_than_a_tile", (150, 3), 1, 64),
        ("no_tokens", (), 2, 16),
    ]:
        q, k, v = (normal(rng, sum(lengths), heads, dim) for _ in "qkv")
        starts = (0, *np.cumsum(lengths, dtype=int).tolist())
        args = {"q": 2.0 * q, "k": k, "v": v, "starts": starts, "scale": dim**-0.5}
        yield Case(name, args)
    q, k, v = (normal(rng, 9, 2, 16) for _ in "qkv")
    k[4:], v[4:] = np.nan, np.nan
    args = {"q": q, "k": k, "v": v, "starts": (0, 4, 9), "scale": 0.25}
    yield Case("nan_stays_in_its_image", args)
    ties = np.ones((6, 2, 16), np.float32)
    args = {"q": ties, "k": ties, "v": normal(rng, 6, 2, 16), "starts": (0, 6), "scale": 30.0}
    yield Case("equal_and_large_logits", args)


def dims(args: Mapping[str, Any]) -> dict[str, int]:
    _, heads, dim = args["q"].shape
    return {"heads": heads, "head_dim": dim}


OPS = (Op("segment_attention", segment_attention, cases, TOLERANCE, dims=dims),)
