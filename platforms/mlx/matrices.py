"""How the matrices of a model lie in memory, and how many threads multiply them.

mlx-lm multiplies by the transpose of each stored matrix. Whether a library of products is faster
when that transpose is what lies in memory row by row depends on the library and on the shape; so
both are timed at load, on the model's own matrices, and values, shapes and code stay the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..interface import Decision
from .forms import fastest

ROWS = (1, 8)
"""Rows of the products that are timed: a step's tokens when rows decode."""
GAIN = 1.05
AT_ONCE = 6
"""Matrices of one shape that are timed together: in turn, so that none stays in a cache."""


def arrange(model: Any) -> list[Decision]:
    """Lay out the plain matrices as is faster here. Call it when the weights are in memory."""
    turned, kept = [], []
    for shape, modules in _by_shape(model).items():
        own, other = _times([module.weight for module in modules[:AT_ONCE]])
        name = f"{shape[0]} x {shape[1]} ({own * 1e3:.2f} ms as stored, {other * 1e3:.2f} turned)"
        if other * GAIN >= own:
            kept.append(name)
            continue
        turned.append(name)
        for module in modules:
            module.weight = mx.contiguous(module.weight.T).T
            mx.eval(module.weight)
    if not turned and not kept:
        return []
    because = f"timed at this start with {', '.join(map(str, ROWS))} rows: {'; '.join(turned)}"
    return [
        Decision(
            "layout of matrices",
            f"{len(turned)} of {len(turned) + len(kept)} shapes column by column",
            because if turned else "none is faster otherwise",
            tuple((name, "not faster turned") for name in kept),
        )
    ]


def _by_shape(model: Any) -> dict[tuple[int, ...], list[Any]]:
    """Modules that multiply by a plain matrix: linear layers, and the embedding of a model that has
    no head of its own."""
    modules = dict(model.named_modules())
    tied = not any(name.split(".")[-1] == "lm_head" for name in modules)
    found: dict[tuple[int, ...], list[Any]] = {}
    for module in modules.values():
        if type(module) is nn.Linear or (tied and type(module) is nn.Embedding):
            found.setdefault(tuple(module.weight.shape), []).append(module)
    return found


def _times(weights: Sequence[mx.array]) -> tuple[float, float]:
    """Seconds of all products as stored, and over turned copies."""
    turned = [mx.contiguous(weight.T).T for weight in weights]
    inputs = [mx.ones((rows, weights[0].shape[1]), weights[0].dtype) for rows in ROWS]
    mx.eval(turned, inputs)
    own, other = fastest([lambda: _products(inputs, weights), lambda: _products(inputs, turned)])
    return own / len(weights), other / len(weights)


def _products(inputs: Iterable[mx.array], weights: Sequence[mx.array]) -> list[mx.array]:
    return [x @ weight.T for x in inputs for weight in weights]
