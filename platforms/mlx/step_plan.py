"""From a StepBatch to what the layers' caches need: where new keys go, what each row reads, masks.

Host work in numpy, once per step and group; every layer of a group shares the arrays.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ..interface_kv import KVGroup
from ..interface_step import StepBatch
from .page_products import RUN, Blocks, hiding

I32 = NDArray[np.int32]
I64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Rows:
    """Neighbouring rows of a step that run together, padded to `width` tokens each."""

    batch: StepBatch
    first: int
    last: int  # exclusive

    @property
    def context(self) -> I64:
        """(R,) tokens in the cache before the step."""
        return self.batch.context_lens[self.first : self.last].astype(np.int64)

    @property
    def counts(self) -> I64:
        """(R,) new tokens."""
        return np.diff(self.batch.query_start[self.first : self.last + 1]).astype(np.int64)

    @property
    def tokens(self) -> I32:
        start = self.batch.query_start
        return self.batch.token_ids[start[self.first] : start[self.last]]

    @property
    def width(self) -> int:
        return int(self.counts.max())

    @property
    def padded(self) -> bool:
        counts = self.counts
        return bool((counts != counts[0]).any())


LONG = 128
"""A row of so many tokens fills the device by itself, and alone it needs no mask and no padding."""


def pieces(batch: StepBatch) -> list[Rows]:
    """The step in runs of rows of like length, long ones alone, in order: a row may read pages that
    a row before it writes in the same step. Padding never more than doubles a run."""
    counts = np.diff(batch.query_start).tolist()
    result, first, longest, total = [], 0, 0, 0
    for row, count in enumerate(counts):
        wider = max(longest, count)
        unlike = wider * (row + 1 - first) > 2 * (total + count) or wider >= LONG
        if row > first and unlike:
            result.append(Rows(batch, first, row))
            first, wider, total = row, count, 0
        longest, total = wider, total + count
    return [*result, Rows(batch, first, len(counts))]


@dataclass(slots=True)
class PagePlan:
    """One group's plan."""

    page_size: int
    offset: Any
    slots: I64  # (R * S,) flat slots of the new tokens; padding goes to the null page
    begun: I64  # pages that the step begins and does not fill
    pages: I64  # (R, P) pages to read
    run: tuple[int, int] | None  # one row whose pages are neighbours: its slots as a range
    length: int | None  # one row: how many of the keys are its own
    base: I64  # (R,) the position of the first key read
    _rows: Rows
    _masks: dict[tuple[int, bool], Any] = field(default_factory=dict)
    _indices: dict[Any, Any] = field(default_factory=dict)

    def mask(self, window: int, as_array: bool) -> Any:
        key = (window, as_array)
        if key not in self._masks:
            self._masks[key] = self._make_mask(window, as_array)
        return self._masks[key]

    def _make_mask(self, window: int, as_array: bool) -> Any:
        rows, width = self._rows, self._rows.width
        ends = rows.context + rows.counts
        if self.length is not None:
            hidden = bool(window) and int(ends[0] - self.base[0]) > window
            if width == 1 and not hidden:
                return None
            if not as_array and not hidden:
                return "causal"
        keys = self.length if self.length is not None else self.pages.shape[1] * self.page_size
        query = mx.array((rows.context[:, None] + np.arange(width)).astype(np.int32))
        return seen_by(query, mx.array(self.base.astype(np.int32)), keys, window)

    def window_of(self, mask: Any) -> int | None:
        """The window that this plan made `mask` for, 0: none. None: it made no such mask."""
        if mask is None:
            return 0 if self.length is not None else None
        return next((key[0] for key, made in self._masks.items() if made is mask), None)

    def lengths(self) -> mx.array:
        """(R,) int32: tokens of each row from the first key read to its newest."""
        if "lengths" not in self._indices:
            ends = self._rows.context + self._rows.counts - self.base
            self._indices["lengths"] = mx.array(ends.astype(np.int32))
        return self._indices["lengths"]

    def blocks(self, window: int) -> Blocks:
        """What rows that decode read; one for all layers."""
        key = ("blocks", window)
        if key not in self._indices:
            pages = self.index("pages", 1, 0).reshape(self.pages.shape)
            hidden = hiding(self.lengths(), self.pages.shape[1] * self.page_size, window)
            self._indices[key] = Blocks(pages, hidden, self._runs(), self.page_size)
        blocks: Blocks = self._indices[key]
        return blocks

    def _runs(self) -> int:
        """How often, from the first column on, RUN pages of every row are neighbours."""
        count, columns = self.pages.shape
        whole = self.pages[:, : columns - columns % RUN].reshape(count, -1, RUN)
        neighbours = (np.diff(whole, axis=2) == 1).all(axis=(0, 2))
        return int(np.logical_and.accumulate(neighbours).sum())

    def index(self, name: str, heads: int, stride: int) -> mx.array:
        """`slots`, `begun` or `pages` for every head of a pool whose heads are `stride` apart:
        (heads * n,) in order of heads."""
        key = (name, heads, stride)
        if key not in self._indices:
            flat = getattr(self, name).reshape(-1)
            every = (np.arange(heads)[:, None] * stride + flat[None]).reshape(-1)
            self._indices[key] = mx.array(every.astype(np.uint32))
        return self._indices[key]


def seen_by(query: mx.array, base: mx.array, keys: int, window: int) -> mx.array:
    """query (R, S) positions; base (R,) the first key's -> (R, 1, S, keys) bool."""
    key = base[:, None, None, None] + mx.arange(keys, dtype=mx.int32)[None, None, None]
    query = query[:, None, :, None]
    seen = key <= query
    return seen & (key > query - window) if window else seen


def plan_pages(rows: Rows, group: KVGroup) -> PagePlan:
    size, context, counts = group.page_size, rows.context, rows.counts
    table = rows.batch.page_tables[group.name][rows.first : rows.last].astype(np.int64)
    ends, count = context + counts, len(context)
    first = np.zeros(count, np.int64)
    if group.window:
        first = np.maximum(0, context - group.window + 1) // size
    last = -(-ends // size)
    wide = int((last - first).max())
    columns = first[:, None] + np.arange(wide)[None]
    # A page that the row does not have reads its first one: real numbers, hidden by the mask.
    columns = np.where(columns < last[:, None], columns, first[:, None])
    pages = np.take_along_axis(table, columns, 1)
    positions = context[:, None] + np.arange(rows.width)
    inside = np.arange(rows.width) < counts[:, None]
    where = np.where(inside, positions, 0)
    slots = np.take_along_axis(table, where // size, 1) * size + where % size
    slots = np.where(inside, slots, 0)
    unfilled = (ends % size != 0) & (context <= (last - 1) * size)
    begun = np.take_along_axis(table, (last - 1)[:, None], 1)[unfilled, 0]
    run = length = None
    if count == 1:
        length = int(ends[0] - first[0] * size)
        if (np.diff(pages[0]) == 1).all():
            run = (int(pages[0, 0]) * size, int(pages[0, 0]) * size + length)
    offset = int(context[0]) if count == 1 else mx.array(context.astype(np.int32))
    return PagePlan(size, offset, slots.reshape(-1), begun, pages, run, length, first * size, rows)


@dataclass(frozen=True, slots=True)
class StatePlan:
    """Slots of the rows of one recurrent group."""

    slots: mx.array  # (R,) uint32
    fresh: mx.array | None  # (R,) bool: begins from zero; None when no row does
    all_fresh: bool
    lengths: mx.array | None
    mask: mx.array | None  # (R, S) bool: real tokens
    key: tuple[int, ...] = ()  # the slots as numbers; empty while a step is traced


def plan_states(rows: Rows, group: KVGroup) -> StatePlan:
    slots = rows.batch.state_slots[group.name][rows.first : rows.last]
    fresh = rows.context == 0
    lengths = mask = None
    if rows.padded:
        lengths = mx.array(rows.counts.astype(np.int32))
        mask = mx.array(np.arange(rows.width) < rows.counts[:, None])
    return StatePlan(
        mx.array(slots.astype(np.uint32)),
        mx.array(fresh) if fresh.any() else None,
        bool(fresh.all()),
        lengths,
        mask,
        tuple(slots.tolist()),
    )
