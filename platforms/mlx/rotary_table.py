"""Rotary embedding from one table of sines a step.

`mx.fast.rope` is one kernel on a GPU. Where MLX has no such kernel it computes the angles, sines
and cosines of the same positions again for the queries and for the keys of every layer, as some
twenty operations each. All layers of a step stand at the same positions: the first one's table
serves the rest.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import mlx.core as mx

ROPE = mx.fast.rope


class RotaryTable(threading.local):
    """What `mx.fast.rope` is called for (RoFormer, arXiv:2104.09864), float32 and halves side by
    side; whatever else goes to `mx.fast.rope` itself.

    The table is kept for the offsets that it was made for: the same array, or the same number. Each
    thread has its own, since an array that is not computed yet belongs to the thread that made it.
    """

    def __init__(self, own: Callable[..., mx.array] = ROPE) -> None:
        self._own = own
        self._offset: int | mx.array | None = None
        self._made: dict[tuple[Any, ...], tuple[mx.array, mx.array, mx.array | None]] = {}

    def __call__(
        self,
        a: mx.array,
        dims: int,
        *,
        traditional: bool,
        base: float | None,
        scale: float,
        offset: int | mx.array,
        freqs: mx.array | None = None,
        stream: Any = None,
    ) -> mx.array:
        """a (R, .., S, D) -> the same shape, the first `dims` of D rotated by offset + 0, 1, ..."""
        if a.dtype != mx.float32 or traditional or stream is not None or a.ndim < 3:
            return self._own(
                a, dims, traditional=traditional, base=base, scale=scale, offset=offset,
                freqs=freqs, stream=stream,
            )  # fmt: skip
        cos, sin = self._table(a.shape[-2], a.ndim, dims, base, scale, offset, freqs)
        half = dims // 2
        turned = mx.concatenate([a[..., half:dims], a[..., :half]], axis=-1)
        if a.shape[-1] == dims:
            return a * cos + turned * sin
        return mx.concatenate([a[..., :dims] * cos + turned * sin, a[..., dims:]], axis=-1)

    def _table(
        self,
        count: int,
        axes: int,
        dims: int,
        base: float | None,
        scale: float,
        offset: int | mx.array,
        freqs: mx.array | None,
    ) -> tuple[mx.array, mx.array]:
        numbers = isinstance(self._offset, int) and isinstance(offset, int)
        if not (self._offset == offset if numbers else self._offset is offset):
            self._offset = offset
            self._made.clear()
        key = count, axes, dims, base, scale, id(freqs)
        if key not in self._made:
            turns = _turns(dims, base) if freqs is None else 1.0 / freqs
            # `freqs` is kept: its id is part of the key.
            self._made[key] = (*_sines(offset, count, axes, scale, turns), freqs)
        return self._made[key][:2]


def _turns(dims: int, base: float | None) -> mx.array:
    """(dims / 2,) radians of a pair from one position to the next."""
    if base is None:
        raise ValueError("rope needs a base or frequencies")
    half = dims // 2
    return mx.exp(mx.arange(0, -half, -1, dtype=mx.float32) * (mx.log(mx.array(base)) / half))


def _sines(
    offset: int | mx.array, count: int, axes: int, scale: float, turns: mx.array
) -> tuple[mx.array, mx.array]:
    """Cosines and sines, (R, .., S, dims) or less; the sines of the first half are negative."""
    positions = mx.arange(count, dtype=mx.float32)
    if isinstance(offset, mx.array):
        offset = offset.reshape(-1, *[1] * (axes - 2)).astype(mx.float32)
    angles = ((positions + offset) * scale)[..., None] * turns
    cos, sin = mx.cos(angles), mx.sin(angles)
    return mx.concatenate([cos, cos], axis=-1), mx.concatenate([-sin, sin], axis=-1)
