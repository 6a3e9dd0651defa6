"""Embedding lookup and the linear layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ...platforms.interface_kernels import Case, Op
from .contract import EXACT, F32, I64, REDUCTION, normal


def embedding(ids: I64, table: F32, scale: float = 1.0) -> F32:
    """ids (T,) int, table (V, H) -> (T, H): rows of the table times `scale`."""
    return table[ids] * np.float32(scale)


def linear(x: F32, weight: F32, bias: F32 | None = None) -> F32:
    """x (T, K), weight (N, K), bias (N,) or None -> x @ weight.T + bias, (T, N)."""
    result = x.astype(np.float64) @ weight.astype(np.float64).T
    if bias is not None:
        result = result + bias
    return result.astype(np.float32)


def embedding_cases(rng: np.random.Generator) -> Iterable[Case]:
    for name, tokens, vocab, width in [
        ("one", 1, 3, 8),
        ("odd_vocab", 7, 257, 48),
        ("no_tokens", 0, 5, 16),
        ("repeated", 33, 11, 5),
    ]:
        ids = rng.integers(0, vocab, tokens, dtype=np.int64)
        if tokens:
            ids[-1] = vocab - 1
        scale = 2.0 if name == "repeated" else 1.0
        yield Case(name, {"ids": ids, "table": normal(rng, vocab, width), "scale": scale})


def linear_cases(rng: np.random.Generator) -> Iterable[Case]:
    """ "real_size" is of a report that 16 bits give NaN from there on, and are right in smaller
    products (intel/compute-runtime 1000)."""
    for name, rows, width, outputs, biased in [
        ("one_row", 1, 64, 48, False),
        ("one_row_biased", 1, 96, 33, True),
        ("odd", 3, 17, 5, True),
        ("vocab_not_multiple_of_8", 2, 64, 1003, False),
        ("wide_batch", 37, 128, 96, False),
        ("one_output", 4, 576, 1, True),
        ("real_size", 40, 2048, 512, False),
        ("no_rows", 0, 32, 16, False),
    ]:
        bias = normal(rng, outputs) if biased else None
        weight = normal(rng, outputs, width, scale=width**-0.5)
        yield Case(name, {"x": normal(rng, rows, width), "weight": weight, "bias": bias})


def embedding_dims(args: Mapping[str, Any]) -> dict[str, int]:
    vocabulary, width = args["table"].shape
    return {"vocabulary": vocabulary, "width": width}


def linear_dims(args: Mapping[str, Any]) -> dict[str, int]:
    n, k = args["weight"].shape
    return {"k": k, "n": n, "bias": int(args["bias"] is not None)}


OPS = (
    Op("embedding", embedding, embedding_cases, EXACT, dims=embedding_dims),
    Op("linear", linear, linear_cases, REDUCTION, dims=linear_dims),
)
