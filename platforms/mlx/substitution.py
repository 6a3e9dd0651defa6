"""Functions that mlx-lm's model files call by name, replaced while a model of ours runs.

No file of mlx-lm is changed: the names are bound anew for the time in which a step's graph is
built, and bound back. So a model that nobody here has seen gets the form that is fast on this
device wherever it calls a function that mlx-lm shares among its models, or MLX's own `rope`.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import mlx.core as mx
from mlx_lm.models.activations import swiglu
from mlx_lm.models.base import scaled_dot_product_attention

SHARED: dict[str, Callable[..., Any]] = {
    "attention": scaled_dot_product_attention,
    "silu_mul": swiglu,
    "rope": mx.fast.rope,
}
"""What may be replaced, by op."""

_lock = threading.RLock()


class Substitution:
    """A context in which a model's files see other functions. May be entered again inside itself;
    threads take turns, which costs nothing where a graph is only built."""

    def __init__(self, model: Any, functions: Mapping[str, Callable[..., Any]]) -> None:
        """`functions`: by op, of `SHARED`."""
        self._places = [
            (file, SHARED[op].__name__, SHARED[op], function)
            for file in _files(model)
            for op, function in functions.items()
            if calls(file, op)
        ]

    def __enter__(self) -> None:
        _lock.acquire()
        for file, name, _, function in self._places:
            setattr(file, name, function)

    def __exit__(self, *error: object) -> None:
        for file, name, original, _ in self._places:
            setattr(file, name, original)
        _lock.release()


def called(model: Any) -> frozenset[str]:
    """The ops of `SHARED` that the model's files import."""
    return frozenset(op for file in _files(model) for op in SHARED if calls(file, op))


def calls(file: ModuleType, op: str) -> bool:
    return getattr(file, SHARED[op].__name__, None) is SHARED[op]


def _files(model: Any) -> list[ModuleType]:
    names = {type(module).__module__ for module in model.modules()}
    files = [sys.modules[name] for name in sorted(names) if name in sys.modules]
    return [*files, mx.fast] if any(_rotates(module) for module in model.modules()) else files


def _rotates(module: Any) -> bool:
    """Whether it calls `mx.fast.rope`: the modules of mlx and mlx-lm that do carry one of these."""
    return any(getattr(module, name, None) is not None for name in ("rope", "rotary_emb"))
