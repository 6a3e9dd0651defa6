"""Gated activations of feed-forward layers (Shazeer 2020: SwiGLU and GEGLU)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

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


def clamped_swiglu(
    gate: F32, up: F32, limit: float, slope: float, offset: float, clamp_after: bool = False
) -> F32:
    """gate, up (T, I) -> (u + offset) * g * sigmoid(slope * g) with g = min(gate, limit) and
    u = clip(up, -limit, limit). DeepSeek-V4: slope 1, offset 0; gpt-oss: slope 1.702, offset 1.

    `clamp_after`: the gate's limit binds g * sigmoid(slope * g) instead of g (Step-3.5-Flash)."""
    wide = gate.astype(np.float64)
    g = wide if clamp_after else np.minimum(wide, limit)
    u = np.clip(up.astype(np.float64), -limit, limit)
    with np.errstate(over="ignore"):
        opened = g / (1.0 + np.exp(-slope * g))
    opened = np.minimum(opened, limit) if clamp_after else opened
    return ((u + offset) * opened).astype(np.float32)


def sigmoid_mul(gate: F32, x: F32) -> F32:
    """gate (T, I), or (T, 1) for all of a row, and x (T, I) -> sigmoid(gate) * x: the output gate
    of an attention layer or a shared expert (Qwen3.5)."""
    return (x / (1.0 + np.exp(-gate.astype(np.float64)))).astype(np.float32)


def sigmoid_cases(rng: np.random.Generator) -> Iterable[Case]:
    for case in cases(rng):
        gate, x = case.args["gate"], case.args["up"]
        yield Case(case.name, {"gate": gate, "x": x})
        yield Case(f"{case.name}_one_gate", {"gate": gate[:, :1].copy(), "x": x})


def clamped_cases(rng: np.random.Generator) -> Iterable[Case]:
    for case in cases(rng):
        for name, limit, slope, offset in [
            ("tight", 1.5, 1.0, 0.0),
            ("sloped", 7.0, 1.702, 1.0),
        ]:
            form = {"limit": limit, "slope": slope, "offset": offset}
            yield Case(f"{case.name}_{name}", {**case.args, **form})
        late = {"limit": 0.75, "slope": 1.0, "offset": 0.0, "clamp_after": True}
        yield Case(f"{case.name}_clamped_after", {**case.args, **late})
    edges = np.array([[2.5, -2.5, 2.0, -2.0, 3e4, -3e4]], np.float32)
    form = {"limit": 2.0, "slope": 1.0, "offset": 0.0}
    yield Case("at_the_limit", {"gate": edges, "up": edges[:, ::-1].copy(), **form})


def cases(rng: np.random.Generator) -> Iterable[Case]:
    for name, rows, width in [("one_row", 1, 1536), ("odd", 5, 33), ("no_rows", 0, 16)]:
        gate, up = normal(rng, rows, width, scale=2.0), normal(rng, rows, width)
        yield Case(name, {"gate": gate, "up": up})
    ends = np.array([[-80.0, -20.0, -0.0, 0.0, 20.0, 80.0]], np.float32)
    yield Case("saturated", {"gate": ends, "up": np.ones_like(ends)})


def width(args: Mapping[str, Any]) -> dict[str, int]:
    return {"width": args["gate"].shape[1]}


def _op(name: str, reference: Callable[..., F32]) -> Op:
    return Op(name, reference, cases, POINTWISE, dims=width)


OPS = (
    _op("silu_mul", silu_mul),
    _op("gelu_tanh_mul", gelu_tanh_mul),
    Op("sigmoid_mul", sigmoid_mul, sigmoid_cases, POINTWISE, dims=width),
    Op("clamped_swiglu", clamped_swiglu, clamped_cases, POINTWISE, dims=width),
)
