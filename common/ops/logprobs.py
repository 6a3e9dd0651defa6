"""Log-probabilities of raw logits: the chosen token's and the n best."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ...platforms.interface_kernels import Case, Op, Tolerance
from .contract import F32, I64, normal

TOLERANCE = {
    "float32": Tolerance(2e-5, 1e-5),
    "bfloat16": Tolerance(2e-5, 1e-5),
    "float16": Tolerance(2e-5, 1e-5),
}
"""Logits are float32 whatever the model's dtype."""


def logprobs(logits: F32, token_ids: I64, top: int) -> tuple[F32, I64, F32]:
    """logits (N, V) float32, token_ids (N,), top = K -> log-probability of each row's token (N,),
    ids (N, K) and log-probabilities (N, K) of the K most likely tokens, best first.

    Natural logarithm of softmax(logits). Among equal values the order is the kernel's choice. A NaN
    logit counts as -inf, as in `sample`; a row with nothing else gives -inf everywhere.
    """
    clean = np.where(np.isnan(logits), -np.inf, logits).astype(np.float64)
    best = clean.max(axis=-1, keepdims=True)
    shifted = clean - np.where(np.isfinite(best), best, 0.0)
    with np.errstate(divide="ignore"):
        values = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    values[~np.isfinite(best[:, 0])] = -np.inf
    rows = np.arange(len(logits))
    order = np.argsort(-values, axis=-1, kind="stable")[:, :top]
    chosen = values[rows, token_ids].astype(np.float32)
    return chosen, order, np.take_along_axis(values, order, -1).astype(np.float32)


def cases(rng: np.random.Generator) -> Iterable[Case]:
    """Two are of reports of a wrong `topk`: rows of 4,096 numbers and more (pytorch 191871), and a
    NaN in one of 512 rows and more (intel/torch-xpu-ops 4839)."""
    for name, rows, vocab, top, scale in [
        ("one_row", 1, 1003, 5, 3.0),
        ("odd_vocab", 4, 257, 20, 10.0),
        ("past_4096", 2, 8203, 20, 9.0),
        ("chosen_only", 3, 50, 0, 1.0),
        ("whole_vocab", 2, 7, 7, 1.0),
        ("no_rows", 0, 16, 2, 1.0),
    ]:
        # Distinct logits, so that the order of the best is defined.
        grid = rng.permuted(np.tile(np.arange(vocab), (rows, 1)), axis=1)
        logits = (grid / vocab * scale).astype(np.float32)
        yield Case(name, {"logits": logits, "token_ids": rng.integers(0, vocab, rows), "top": top})
    large = normal(rng, 1, 33, scale=1.0) + np.float32(3e4)
    yield Case("large_values", {"logits": large, "token_ids": np.array([7]), "top": 1})
    broken = normal(rng, 2, 20)
    broken[0, 3], broken[0, 5] = np.nan, -np.inf
    many = rng.permuted(np.tile(np.arange(32.0, dtype=np.float32), (513, 1)), axis=1)
    many[0, 3] = np.nan
    yield Case("nan_beside_many", {"logits": many, "token_ids": np.arange(513) % 32, "top": 4})
    yield Case("nan_and_minus_inf", {"logits": broken, "token_ids": np.array([4, 1]), "top": 4})


OPS = (Op("logprobs", logprobs, cases, TOLERANCE, float32=frozenset({"logits"})),)
