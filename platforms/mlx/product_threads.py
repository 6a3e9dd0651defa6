"""How many threads multiply, where MLX's products come from a library that can be told.

On a CPU MLX calls whatever BLAS the process has. More threads make a long prompt's products faster
and a few rows' slower, where threads wait for each other longer than they compute. So the library
is timed at load with few rows and with many, and told before each step.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from ...common.errors import ConfigError
from ..interface import Decision
from .forms import fastest

ROWS = (1, 8, 32, 128)
"""Tokens of a step that are timed; what lies between goes by the next smaller."""
MATRICES = 8
SIZE = 1024
GAIN = 1.3
"""How many times faster more threads must be. Between two products they wait without sleeping, and
take the time of whoever computes the rest of a step: what a few per cent gain, that loses twice."""


class ProductThreads:
    """`tell(tokens)` before a step of so many tokens is started; nothing may run meanwhile."""

    def __init__(self, set_threads: Callable[[int], Any], counts: dict[int, int]) -> None:
        self._set = set_threads
        self._counts = counts
        self._now = 0

    def tell(self, tokens: int) -> None:
        wanted = self._counts[max(rows for rows in self._counts if rows <= max(1, tokens))]
        if wanted != self._now:
            self._set(wanted)
            self._now = wanted


def product_threads(wanted: int | None) -> tuple[ProductThreads | None, Decision]:
    """`wanted`: --threads. Raises ConfigError when it is set and nobody can be told."""
    process = ctypes.CDLL(None)
    get, tell = (getattr(process, f"openblas_{verb}_num_threads", None) for verb in ("get", "set"))
    what = "threads of products"
    if get is None or tell is None:
        because = "the BLAS of this process cannot be told; the one that MLX brings has one thread"
        if wanted not in (None, 1):
            raise ConfigError(f"--threads {wanted} cannot be had: {because}. Leave it out.")
        return None, Decision(what, "as the BLAS has them", because)
    if wanted is not None:
        return ProductThreads(tell, {1: wanted}), Decision(what, str(wanted), "set by the user")
    most = int(get())
    counts = {rows: _better(rows, most, tell) for rows in ROWS}
    tell(most)
    listed = ", ".join(f"{count} from {rows} tokens" for rows, count in counts.items())
    because = f"1 and {most} timed at this start; more must be {GAIN} times as fast"
    return ProductThreads(tell, counts), Decision(what, listed, because)


def _better(rows: int, most: int, tell: Callable[[int], Any]) -> int:
    if most == 1:
        return 1
    rng = np.random.default_rng(rows)
    x = mx.array(rng.standard_normal((rows, SIZE)).astype(np.float32))
    weights = [mx.ones((SIZE, SIZE)) + i for i in range(MATRICES)]
    mx.eval(x, weights)

    def run(threads: int) -> list[mx.array]:
        tell(threads)
        return [x @ weight.T for weight in weights]

    single, all_of_them = fastest([lambda: run(1), lambda: run(most)])
    return most if all_of_them * GAIN < single else 1
