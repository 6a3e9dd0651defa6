"""`sample` and `logprobs` in MLX: all rows at once, lazily, nothing read on the host.

The contract and the order of application are in `common/ops/sample.py`.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ...common.ops.sample import LONGEST
from ..interface_step import SamplingArrays


def wide_dtype() -> mx.Dtype:
    """Of sums over the vocabulary; Metal has no float64."""
    return mx.float64 if mx.default_device().type == mx.DeviceType.cpu else mx.float32


def sample(
    logits: mx.array,
    sampling: SamplingArrays,
    grammar_mask: mx.array | None = None,
    pending: mx.array | None = None,
) -> mx.array:
    """logits (R, V) float32; grammar_mask (R, ceil(V/32)) uint32; pending (R,) int32
    -> token ids (R,) int32, -1 for a row without any allowed token."""
    if not len(logits):
        return mx.zeros((0,), mx.int32)
    low = mx.array(-mx.inf)
    x = mx.where(mx.isnan(logits), low, logits)
    x = mx.where(x == mx.inf, 1e30, x)
    x = _biased(x, sampling)
    x = _penalised(x, sampling, pending)
    if grammar_mask is not None:
        x = mx.where(unpack_mask(grammar_mask, x.shape[1]), x, low)
    best = x.max(axis=-1)
    tokens = mx.argmax(x, axis=-1).astype(mx.int32)
    drawing = np.flatnonzero(sampling.temperature > 0)
    if len(drawing) == len(x):
        tokens = _draw(x, best, sampling, drawing)
    elif len(drawing):
        rows = mx.array(drawing.astype(np.uint32))
        tokens[rows] = _draw(x[rows], best[rows], sampling, drawing)
    return mx.where(best == -mx.inf, -1, tokens)


def logprobs(logits: mx.array, token_ids: mx.array, top: int) -> tuple[mx.array, ...]:
    """logits (N, V) float32, token_ids (N,) -> as `common/ops/logprobs.py`."""
    clean = mx.where(mx.isnan(logits), mx.array(-mx.inf), logits)
    best = clean.max(axis=-1, keepdims=True)
    finite = mx.where(mx.abs(best) == mx.inf, 0.0, best)
    shifted = clean - finite
    values = shifted - mx.log(mx.exp(shifted).sum(axis=-1, keepdims=True))
    values = mx.where(mx.abs(best) == mx.inf, mx.array(-mx.inf), values)
    chosen = mx.take_along_axis(values, token_ids[:, None].astype(mx.int32), axis=-1)[:, 0]
    ids = _best(values, top)
    return chosen, ids, mx.take_along_axis(values, ids, axis=-1)


def _best(values: mx.array, top: int) -> mx.array:
    """(N, top) ids of the largest, best first."""
    vocab = values.shape[1]
    if top == 0:
        return mx.zeros((len(values), 0), mx.int32)
    if top < vocab:
        some = mx.argpartition(-values, kth=top - 1, axis=-1)[:, :top]
    else:
        some = mx.broadcast_to(mx.arange(vocab), values.shape)
    order = mx.argsort(-mx.take_along_axis(values, some, axis=-1), axis=-1)
    return mx.take_along_axis(some, order, axis=-1).astype(mx.int32)


def unpack_mask(words: mx.array, vocab: int) -> mx.array:
    """(R, W) uint32 -> (R, vocab) bool."""
    bits = (words[..., None] >> mx.arange(32, dtype=mx.uint32)) & 1
    return bits.reshape(len(words), -1)[:, :vocab] != 0


def _column(values: NDArray[np.generic]) -> mx.array:
    return mx.array(values)[:, None]


def _biased(x: mx.array, s: SamplingArrays) -> mx.array:
    if not len(s.bias_ids):
        return x
    rows = np.repeat(np.arange(len(x)), np.diff(s.bias_start)).astype(np.uint32)
    where = mx.array(rows), mx.array(s.bias_ids.astype(np.uint32))
    x[where] = x[where] + mx.array(s.bias_values)
    return x


def _penalised(x: mx.array, s: SamplingArrays, pending: mx.array | None) -> mx.array:
    asks = (s.repetition_penalty != 1) | (s.presence_penalty != 0) | (s.frequency_penalty != 0)
    chosen = np.flatnonzero(asks)
    if not len(chosen):
        return x
    rows = mx.array(chosen.astype(np.uint32))
    part = x[rows]
    made = _counts(part.shape, chosen, s.output_start, s.output_ids)
    if pending is not None:
        new = pending[rows]
        real = (new >= 0).astype(mx.float32)
        made = made.at[mx.arange(len(chosen)), mx.maximum(new, 0)].add(real)
    if (s.repetition_penalty[chosen] != 1).any():
        seen = (_counts(part.shape, chosen, s.prompt_start, s.prompt_ids) + made) > 0
        factor = _column(s.repetition_penalty[chosen])
        part = mx.where(seen, mx.where(part > 0, part / factor, part * factor), part)
    part = part - _column(s.presence_penalty[chosen]) * (made > 0)
    part = part - _column(s.frequency_penalty[chosen]) * made
    x[rows] = part
    return x


def _counts(
    shape: tuple[int, ...],
    rows: NDArray[np.intp],
    start: NDArray[np.int32],
    ids: NDArray[np.int32],
) -> mx.array:
    """(len(rows), V) float32: how often each token is in the ragged ids of each of `rows`."""
    counts = mx.zeros(shape, mx.float32)
    position = np.full(len(start) - 1, -1)
    position[rows] = np.arange(len(rows))
    owner = np.repeat(position, np.diff(start))
    cells, repeats = np.unique(
        owner[owner >= 0] * shape[1] + ids[owner >= 0].astype(np.int64), return_counts=True
    )
    if len(cells):
        where = (mx.array((cells // shape[1]).astype(np.uint32)),
                 mx.array((cells % shape[1]).astype(np.uint32)))  # fmt: skip
        counts[where] = mx.array(repeats.astype(np.float32))
    return counts


def _draw(x: mx.array, best: mx.array, s: SamplingArrays, rows: NDArray[np.intp]) -> mx.array:
    """The exponential race of the contract. x (N, V) are the logits of `rows`."""
    best = mx.maximum(best, -1e30)[:, None]  # a row of -inf is refused by the caller
    scaled = (x - best) / _column(s.temperature[rows])
    weights = mx.exp(scaled)
    if ((s.top_k[rows] > 0) | (s.top_p[rows] < 1)).any():
        weights = mx.where(_kept(x, scaled, s, rows), weights, 0.0)
    if (s.min_p[rows] > 0).any():
        weights = mx.where(weights >= _column(s.min_p[rows]), weights, 0.0)  # the best weighs 1
    race = weights / _exponentials(s.uniform[rows], x.shape[1])
    return mx.argmax(race, axis=-1).astype(mx.int32)


def _kept(x: mx.array, scaled: mx.array, s: SamplingArrays, rows: NDArray[np.intp]) -> mx.array:
    """(N, V) bool: what top-k and then top-p keep. A kept set is everything above a threshold and
    the first so many of its equals, so ties go to the lowest id whatever the sort does."""
    vocab = x.shape[1]
    wide = wide_dtype()
    top_k = np.where(s.top_k[rows] > 0, np.minimum(s.top_k[rows], vocab), vocab)
    values = -mx.sort(-scaled, axis=-1)
    inside = mx.arange(vocab)[None] < _column(top_k.astype(np.int32))
    mass = mx.where(inside, mx.exp(values), 0.0).astype(wide)
    reached = mx.cumsum(mass, axis=-1)
    # Everything is kept where top-p is off: `before` never reaches more than the total.
    share = np.where(s.top_p[rows] < 1, s.top_p[rows], 2.0).astype(np.float32)
    bound = _column(share).astype(wide) * reached[:, -1:]
    count = mx.maximum((inside & (reached - mass < bound)).sum(axis=-1, keepdims=True), 1)
    threshold = mx.take_along_axis(values, count - 1, axis=-1)
    equals = count - (values > threshold).sum(axis=-1, keepdims=True)
    equal = scaled == threshold
    first = mx.cumsum(equal.astype(mx.int32), axis=-1) <= equals
    return (scaled > threshold) | (equal & first)


def _exponentials(uniform: NDArray[np.float64], vocab: int) -> mx.array:
    """(N, V) float32: what `exponentials` of the contract gives for each draw."""
    bits = (uniform * 2.0**53).astype(np.uint64)
    low = _column((bits & np.uint64(0xFFFFFFFF)).astype(np.uint32))
    high = _column((bits >> np.uint64(32)).astype(np.uint32))
    ids = mx.arange(vocab, dtype=mx.uint32)[None]
    h = mix32(mix32(ids * mx.array(0x9E3779B9, mx.uint32) + low) ^ high)
    x = (h.astype(mx.float32) + 0.5) * 2.0**-32
    return mx.minimum(-mx.log1p(-x), LONGEST)


def mix32(h: mx.array) -> mx.array:
    h = (h ^ (h >> 16)) * mx.array(0x85EBCA6B, mx.uint32)
    h = (h ^ (h >> 13)) * mx.array(0xC2B2AE35, mx.uint32)
    return h ^ (h >> 16)
