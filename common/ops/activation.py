"""Gated activations of feed-forward layers (Shazeer 2020: SwiGLU and GEGLU)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from ...platforms.interface_kernels import Case, Op
from .contract import F32, POINTWISE, normal


def silu_mul(gate: F32, up: F32) -> F32:
    """gate, up (T, I) -> gate * sigmoid(gate) * up."""
    wide = gate.astype(np.float64)
    return (wide / (1.0 + np.exp(-wide)) * up).astype(np.float32)


def gelu_tanh_mul(gate: F32, up: F32) -> F32:
    """gate, up (T, I) -> gelu(gate) * up, gelu by its tanh approximation (Hendrycks and Gimpel)."""
    wide = gate.astype(np.float64)
    inner = np.sqrt(2.0 / np.pi) * (wide + 0.044715 * wide**3)
    return (0.5 * wide * (1.0 + np.tanh(inner)) * up).astype(np.float32)


def cases(rng: np.random.Generator) -> Iterable[Case]:
    for name, rows, width in [("one_row", 1, 1536), ("odd", 5, 33), ("no_rows", 0, 16)]:
        gate, up = normal(rng, rows, width, scale=2.0), normal(rng, rows, width)
        yield Case(name, {"gate": gate, "up": up})
    ends = np.array([[-80.0, -20.0, -0.0, 0.0, 20.0, 80.0]], np.float32)
    yield Case("saturated", {"gate": ends, "up": np.ones_like(ends)})


def _op(name: str, reference: Callable[..., F32]) -> Op:
    return Op(name, reference, cases, POINTWISE)


OPS = (_op("silu_mul", silu_mul), _op("gelu_tanh_mul", gelu_tanh_mul))
