"""Decode attention that reads keys and values in their pages: one query a row goes to the kernel of
`paged_attention`, all else to attention over gathered arrays.

MLX is lazy: what a stand-in cache gathered for a layer is never computed if nobody reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from ..interface import Decision
from ..interface_kernels import Kernel
from .caches import PagedCache
from .page_kernels import page_gather

OP = "paged_attention"
WHAT = "decode attention"
GATHERED, IN_PAGES = "over gathered pages", "in pages"
ROWS, KEYS, HEADS, KV_HEADS, DIM, PAGE = 8, 512, 8, 2, 64, 16
"""Of the step that is timed."""


def in_pages(kernel: Kernel, gathered: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """What mlx-lm's attention function is called for; `gathered` has its arguments too."""

    def attend(
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        cache: Any,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        found = None
        if queries.shape[2] == 1 and isinstance(cache, PagedCache):
            found = cache.in_place(keys, values, mask)
        if found is None or found.keys.dtype != queries.dtype:
            return gathered(queries, keys, values, cache, scale=scale, mask=mask, sinks=sinks)
        made: mx.array = kernel.fn(
            queries[:, :, 0], found.keys, found.values, found.pages, found.lengths,
            found.heads, found.page_size, scale, found.window, sinks,
        )  # fmt: skip
        return made[:, :, None]

    return attend


def choose(
    kernel: Kernel,
    gathered: Callable[..., mx.array],
    dtype: mx.Dtype,
    wanted: Mapping[str, str],
    clock: Callable[..., list[float]],
    gain: float,
) -> tuple[Callable[..., mx.array] | None, Decision]:
    """The attention function, None for `gathered` itself, and why. `clock`: seconds of each of some
    ways; reading in pages must be `gain` times as fast, or named by the user."""
    if OP in wanted:
        return in_pages(kernel, gathered), Decision(WHAT, IN_PAGES, f"{OP} was named by the user")
    args, over_gathered = _toy(dtype, gathered)
    slow, fast = clock([over_gathered, lambda: kernel.fn(*args)])
    times = {GATHERED: f"{slow * 1e3:.2f} ms", IN_PAGES: f"{fast * 1e3:.2f} ms"}
    better = fast * gain < slow
    name, other = (IN_PAGES, GATHERED) if better else (GATHERED, IN_PAGES)
    reason = "slower" if better else f"not {gain} times as fast ({kernel.provider} kernel)"
    because = f"{times[name]} at this start, the other {times[other]}"
    return in_pages(kernel, gathered) if better else None, Decision(
        WHAT, name, because, ((other, reason),)
    )


def _toy(dtype: mx.Dtype, gathered: Callable[..., mx.array]) -> tuple[list[Any], Callable[[], Any]]:
    """Arguments of the kernel, and the same step the other way."""
    rng = np.random.default_rng(0)
    columns = KEYS // PAGE
    slots = KV_HEADS * (ROWS * columns + 1) * PAGE
    shapes = ((ROWS, HEADS, DIM), (slots, DIM), (slots, DIM))
    q, keys, values = (
        mx.array(rng.standard_normal(shape).astype(np.float32)).astype(dtype) for shape in shapes
    )
    order = 1 + rng.permutation(ROWS * columns).reshape(ROWS, columns)
    pages, lengths = mx.array(order.astype(np.uint32)), mx.full((ROWS,), KEYS, mx.int32)
    seen = mx.ones((ROWS, 1, 1, KEYS), mx.bool_)
    mx.eval(q, keys, values, pages, lengths, seen)

    def over_gathered() -> mx.array:
        found = page_gather(keys, values, pages, KV_HEADS, PAGE)
        return gathered(q[:, :, None], *found, None, scale=DIM**-0.5, mask=seen, sinks=None)

    return [q, keys, values, pages, lengths, KV_HEADS, PAGE, DIM**-0.5], over_gathered
