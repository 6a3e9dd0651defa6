"""Which of two ways to compute the same is faster on this device: measured at load, told in
`--explain`, and named by the user with `--kernel OP=FORM` where he wants the other.

A GPU has fused kernels for what a CPU backend puts together from slow parts, and a library of
products prefers one layout of a matrix. Neither is known from a name, both are from a clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from ...common.errors import KernelError
from ..interface import Decision
from ..interface_kernels import Kernel
from . import paged_decode, softmax_attention
from .rotary_table import RotaryTable
from .substitution import SHARED, Substitution, called

OWN = "mlx-lm"
PARTS, TABLE = "parts", "table"
GAIN = 1.2
"""How many times faster the other form must be; less is within what a clock errs."""
REPEATS = 5
ENOUGH = 0.3
"""Seconds after which slow ways are not repeated further."""
ROWS, LAYERS = 8, 16
"""Of a step in which rows decode."""
Way = Callable[..., Any]


def attention_in_parts() -> Callable[..., mx.array]:
    """What mlx-lm's function is called for, over stand-ins for its caches, which hold no bits."""

    def attend(
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        cache: Any,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        return softmax_attention.attend(queries, keys, values, scale, mask, sinks)

    return attend


def forms(op: str) -> dict[str, Callable[..., Any]]:
    """mlx-lm's own and the other, by name."""
    if op == "rope":
        return {OWN: SHARED[op], TABLE: RotaryTable()}
    other = {"attention": attention_in_parts(), "silu_mul": softmax_attention.silu_mul}
    return {OWN: SHARED[op], PARTS: other[op]}


def choose(
    model: Any, dtype: mx.Dtype, wanted: Mapping[str, str], paged: Kernel
) -> tuple[Substitution, list[Decision]]:
    """The forms of what this model calls. `wanted`: those that the user names; `paged`: the kernel
    of `paged_attention`. Raises KernelError when a named form does not exist or the model does not
    call the op."""
    used = sorted(called(model))
    serving = {*used, paged_decode.OP} if "attention" in used else {*used}
    for op in (wanted.keys() & {*SHARED, paged_decode.OP}) - serving:
        raise KernelError(
            f"--kernel {op}={wanted[op]}: this model's files call no function of mlx-lm for it; "
            f"they call: {', '.join(used) or 'none'}."
        )
    chosen, decisions = {}, []
    for op in used:
        ways = forms(op)
        name, decision = _choose(op, ways, _work(op, dtype), wanted.get(op))
        decisions.append(decision)
        if name != OWN:
            chosen[op] = ways[name]
    if "attention" in used:
        gathered = chosen.get("attention", SHARED["attention"])
        decode, decision = paged_decode.choose(paged, gathered, dtype, wanted, fastest, GAIN)
        decisions.append(decision)
        if decode is not None:
            chosen["attention"] = decode
    return Substitution(model, chosen), decisions


def _choose(
    op: str, ways: Mapping[str, Way], work: Callable[[Way], Any], wanted: str | None
) -> tuple[str, Decision]:
    what = f"kernel {op}"
    if wanted is not None:
        if wanted not in ways:
            raise KernelError(f"No form {wanted!r} of {op}; there are: {', '.join(ways)}.")
        return wanted, Decision(what, wanted, "named by the user")
    times = dict(zip(ways, fastest([partial(work, way) for way in ways.values()]), strict=True))
    new = next(name for name in ways if name != OWN)
    name, other = (new, OWN) if times[new] * GAIN < times[OWN] else (OWN, new)
    because = f"{times[name] * 1e3:.2f} ms at this start, the other {times[other] * 1e3:.2f} ms"
    reason = "slower" if other == OWN else f"not {GAIN} times as fast"
    return name, Decision(what, name, because, ((other, reason),))


def fastest(ways: Sequence[Callable[[], Any]]) -> list[float]:
    """Seconds of each, the least of some interleaved runs."""
    best = [float("inf")] * len(ways)
    for way in ways:
        mx.eval(way())
    end = time.perf_counter() + ENOUGH
    for repeat in range(REPEATS):
        if repeat > 1 and time.perf_counter() > end:
            break
        for i, way in enumerate(ways):
            began = time.perf_counter()
            mx.eval(way())
            best[i] = min(best[i], time.perf_counter() - began)
    return best


def _work(op: str, dtype: mx.Dtype) -> Callable[[Way], Any]:
    """What a way is timed with, of the size of a small model's step: a chunk of a prompt, and for
    `rope` the layers of a step in which rows decode."""
    rng = np.random.default_rng(0)

    def made(*shapes: tuple[int, ...]) -> list[mx.array]:
        return [mx.array(rng.standard_normal(shape), mx.float32).astype(dtype) for shape in shapes]

    if op == "rope":
        (x,) = made((ROWS, 4, 1, 64))

        def layers(rope: Way) -> list[mx.array]:
            # New offsets each time: the angles of a step belong to its cost.
            where = mx.arange(ROWS)
            how = {"traditional": False, "base": 1e4, "scale": 1.0, "offset": where}
            return [rope(x, 64, **how) for _ in range(LAYERS)]

        return layers
    if op == "silu_mul":
        halves = made((128, 1024), (128, 1024))
        return lambda silu_mul: silu_mul(*halves)
    arrays = made((1, 4, 256, 64), (1, 2, 256, 64), (1, 2, 256, 64))
    return lambda attend: attend(*arrays, None, 0.125, "causal")
