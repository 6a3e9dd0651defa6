"""`sample` for rows that adjust no logits, what they ask for in arrays of fixed shape: what a
recorded step can hold. Temperature, top-k, top-p, min-p and the draw are those of `sample`."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from ...platforms.interface_kernels import Case, Op
from .contract import EXACT, F32, I32, I64, normal
from .sample import sample
from .sample_cases import filter_cases, greedy_cases, sampling_arrays


def draw(
    logits: F32,
    temperature: F32,
    top_k: I32,
    top_p: F32,
    min_p: F32,
    draws: NDArray[np.uint32],
    filtered: bool,
) -> I64:
    """logits (R, V) float32; of each row (R,) as in SamplingArrays; draws (R, 2), the low 32 and
    the high 21 of the 53 bits of `uniform` -> token ids (R,), -1 for a row without any allowed
    token. `filtered` False promises that no row has top-k, top-p or min-p."""
    asked = zip(temperature, top_k, top_p, min_p, draws.astype(np.uint64), strict=True)
    rows = [
        {
            "temperature": heat,
            "top_k": most,
            "top_p": share,
            "min_p": least,
            "uniform": float((int(high) << 32) + int(low)) / 2.0**53,
        }
        for heat, most, share, least, (low, high) in asked
    ]
    return sample(logits, sampling_arrays(rows))


def halves(uniform: NDArray[np.float64]) -> NDArray[np.uint32]:
    """(R, 2): each draw's 53 bits as a low and a high word."""
    bits = (uniform * 2.0**53).astype(np.uint64)
    return np.stack([bits & np.uint64(0xFFFFFFFF), bits >> np.uint64(32)], 1).astype(np.uint32)


def cases(rng: np.random.Generator) -> Iterable[Case]:
    for case in (*greedy_cases(rng), *filter_cases(rng), _mixture(rng)):
        s = case.args["sampling"]
        asked = {name: getattr(s, name) for name in ("temperature", "top_k", "top_p", "min_p")}
        some = bool(((s.top_k > 0) | (s.top_p < 1) | (s.min_p > 0)).any())
        draws = {"draws": halves(s.uniform), "filtered": some}
        yield Case(case.name, {"logits": case.args["logits"], **asked, **draws})


def _mixture(rng: np.random.Generator) -> Case:
    """Every filter alone and with the others, beside greedy rows and rows without."""
    rows = [
        {
            "temperature": float(rng.choice([0.0, 0.3, 1.0, 1.7])),
            "top_k": int(rng.choice([0, 1, 7, 2000])),
            "top_p": float(rng.choice([1.0, 0.2, 0.95])),
            "min_p": float(rng.choice([0.0, 0.02, 0.5])),
            "uniform": rng.random(),
        }
        for _ in range(40)
    ]
    args = {"logits": normal(rng, 40, 1003, scale=2.0), "sampling": sampling_arrays(rows)}
    return Case("mixture", args)


OPS = (
    Op(
        "draw",
        draw,
        cases,
        EXACT,
        float32=frozenset({"logits", "temperature", "top_p", "min_p"}),
    ),
)
