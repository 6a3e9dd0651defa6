"""Each recognised part is run once at load beside mlx-lm's own way of running it, on a toy input.

A module that was taken for what it is not would otherwise answer wrongly and at full speed. For a
part that remembers: two sequences go through the engine's pages or slots in one padded batch, in
chunks, and must give what each gives alone over mlx-lm's own cache. For one that does not: every
token alone must give what it gives among others.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ...common.errors import CheckpointError
from ...common.ops.sample_cases import sampling_arrays
from ..interface_kv import CacheNeed, KVGroup, KVKind, StateArray
from ..interface_step import StepBatch
from .adapters import ARRAYS, Layer, Part, query_heads, variant
from .caches import Cache, PagedCache, StateCache
from .pools import LayerPages, LayerStates
from .step_plan import Rows, plan_pages, plan_states
from .substitution import Substitution

TOLERANCE = {mx.float32: 2e-4, mx.float16: 2e-2, mx.bfloat16: 8e-2}
"""Largest difference allowed, relative to the largest output."""
TOY_WINDOW = 3
CHUNKS = ((4, 2), (1, 1), (3, 1), (1, 1))
"""New tokens of both sequences in each step; they differ, so that rows are padded."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a layer remembers, and how far the stand-in was from the original."""

    need: CacheNeed
    dtypes: tuple[mx.Dtype, ...]  # of keys and values
    name: str
    difference: float


def examine(layer: Layer, width: int, dtype: mx.Dtype, forms: Substitution) -> Found:
    """Learn what the layer's mixer keeps and check its stand-in; check its other parts. `width`:
    features of a token. `forms`: what will serve, compared with mlx-lm's own functions. Raises
    CheckpointError naming the part."""
    for part in layer.others:
        _check_by_token(part, width, dtype, forms)
    window = _window(layer)
    inputs = _toy(2, sum(a for a, _ in CHUNKS), width, dtype)
    toy_window = TOY_WINDOW if window else 0
    expected, cache = _alone(layer, inputs, toy_window)
    found = _learn(layer, cache, window)
    with forms:
        actual = _together(layer, found, inputs, toy_window)
    difference = _difference(layer.mixer, actual, expected, dtype)
    return Found(found.need, found.dtypes, found.name, difference)


def _window(layer: Layer) -> int:
    size = getattr(layer.cache, "max_size", None)
    if size is None:
        return 0
    if getattr(layer.cache, "keep", 0):
        raise CheckpointError(
            f"{layer.mixer.path} keeps the first {layer.cache.keep} tokens of a sequence beside "
            "its window; this version does not serve that."
        )
    return int(size)


def _toy(rows: int, tokens: int, width: int, dtype: mx.Dtype) -> mx.array:
    values = np.random.default_rng(width).standard_normal((rows, tokens, width))
    return mx.array(values.astype(np.float32)).astype(dtype)


def _run(part: Part, x: mx.array, cache: Any) -> mx.array:
    tokens = x.shape[1]
    if all(hasattr(cache, name) for name in ARRAYS):
        mask = cache.make_mask(tokens)
    else:
        mask = cache.make_mask(tokens, return_array=True, window_size=None)
    try:
        return part.module(x, mask, cache)
    except Exception as error:
        raise CheckpointError(
            f"{part.path} was recognised as {part.adapter.name} and cannot be run as such: "
            f"{type(error).__name__}: {error}"
        ) from error


def _alone(layer: Layer, inputs: mx.array, window: int) -> tuple[list[mx.array], Any]:
    """Both sequences one after the other over mlx-lm's cache, and the cache of the last."""
    expected, own = [], layer.cache
    for row in range(len(inputs)):
        own = copy.deepcopy(layer.cache)
        if window:
            own.max_size = window
        at, pieces = 0, []
        for chunk in CHUNKS:
            pieces.append(_run(layer.mixer, inputs[row : row + 1, at : at + chunk[row]], own))
            at += chunk[row]
        expected.append(mx.concatenate(pieces, axis=1))
        mx.eval(expected)
    return expected, own


def _learn(layer: Layer, used: Any, window: int) -> Found:
    """The needs of a layer, from mlx-lm's cache after it was used."""
    part = layer.mixer
    if all(hasattr(used, name) for name in ARRAYS):
        arrays = _items(used)
        states = tuple(StateArray(tuple(a.shape[1:]), _name(a.dtype)) for a in arrays)
        need = CacheNeed(KVKind.RECURRENT, 0, 0, states=states)
        return Found(need, (), variant(part), 0.0)
    keys, values = used.keys, used.values
    heads, key_dim, value_dim = keys.shape[1], keys.shape[-1], values.shape[-1]
    other = value_dim if value_dim != key_dim else 0
    need = CacheNeed(KVKind.WINDOW if window else KVKind.FULL, heads, key_dim, window, other)
    name = variant(part, query_heads(part.module), heads, window)
    return Found(need, (keys.dtype, values.dtype), name, 0.0)


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def _items(cache: Any) -> list[mx.array]:
    found: list[mx.array] = []
    while True:
        try:
            found.append(cache[len(found)])
        except IndexError:
            return found


def _together(layer: Layer, found: Found, inputs: mx.array, window: int) -> list[mx.array]:
    """Both sequences as rows of one batch, over pages or slots in shuffled order."""
    size, name = 2, "toy"
    steps = inputs.shape[1]
    table = np.random.default_rng(0).permutation(np.arange(1, 2 * steps + 1)).reshape(2, steps)
    group = KVGroup(name, found.need.kind, size, 2 * steps + 1, window)
    stand_in = stand_in_for(found, group)
    context = np.zeros(2, np.int32)
    pieces: list[list[mx.array]] = [[], []]
    for chunk in CHUNKS:
        counts = np.array(chunk, np.int32)
        batch = _batch(group, table.astype(np.int32), context, counts)
        bind(stand_in, batch, group)
        spans = zip(inputs, context.tolist(), counts.tolist(), strict=True)
        rows = [row[at : at + n] for row, at, n in spans]
        wide = int(counts.max())
        padded = mx.stack([mx.pad(row, [(0, wide - len(row)), (0, 0)]) for row in rows])
        out = _run(layer.mixer, padded, stand_in)
        for row in range(2):
            pieces[row].append(out[row, : int(counts[row])])
        context = context + counts
    return [mx.concatenate(piece, axis=0)[None] for piece in pieces]


def _batch(group: KVGroup, table: Any, context: Any, counts: Any) -> StepBatch:
    recurrent = group.kind is KVKind.RECURRENT
    return StepBatch(
        step=0,
        row_ids=np.arange(2, dtype=np.int32),
        token_ids=np.zeros(int(counts.sum()), np.int32),
        query_start=np.concatenate(([0], np.cumsum(counts))).astype(np.int32),
        context_lens=context,
        page_tables={} if recurrent else {group.name: table},
        want=np.zeros(2, np.uint8),
        sampling=sampling_arrays([{}, {}]),
        state_slots={group.name: np.array([2, 1], np.int32)} if recurrent else {},
    )


def stand_in_for(found: Found, group: KVGroup) -> Cache:
    """A layer's cache with pages or slots of its own."""
    need = found.need
    if need.kind is KVKind.RECURRENT:
        return StateCache(LayerStates(group, need.states))
    pages = LayerPages(group, need.kv_heads, need.head_dim, need.values_dim, found.dtypes[0])
    return PagedCache(pages, group.window)


def bind(cache: Cache, batch: StepBatch, group: KVGroup) -> None:
    if isinstance(cache, StateCache):
        cache.plan = plan_states(Rows(batch, 0, batch.rows), group)
    else:
        cache.plan = plan_pages(Rows(batch, 0, batch.rows), group)


def _difference(
    part: Part, actual: list[mx.array], expected: list[mx.array], dtype: mx.Dtype
) -> float:
    """Largest difference relative to the largest output. Raises CheckpointError when it is more
    than rounding explains, or no number."""
    largest = max(float(mx.abs(e).max()) for e in expected) or 1.0
    apart = max(float(mx.abs(a - e).max()) for a, e in zip(actual, expected, strict=True))
    relative = apart / largest
    if not relative <= TOLERANCE[dtype]:  # also NaN
        raise CheckpointError(
            f"{part.path} was recognised as {part.adapter.name}, but run that way it differs from "
            f"mlx-lm's own by {relative:.2g} of its largest output (allowed: {TOLERANCE[dtype]}). "
            "It does something else; this version cannot serve it."
        )
    return relative


def _check_by_token(part: Part, width: int, dtype: mx.Dtype, forms: Substitution) -> None:
    """That a part treats each token by itself, so that batches and padding change nothing."""
    x = _toy(2, 3, width, dtype)
    try:
        whole = part.module(x)
        with forms:
            rows = [mx.concatenate([part.module(t[None, None]) for t in row]) for row in x]
        single = mx.stack(rows)
    except Exception as error:
        raise CheckpointError(
            f"{part.path} was recognised as {part.adapter.name} and cannot be run as such: "
            f"{type(error).__name__}: {error}"
        ) from error
    _difference(part, [single.reshape(whole.shape)], [whole], dtype)
