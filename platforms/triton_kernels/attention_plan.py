"""The host side of paged attention: a step cut into pieces of work, as integers in one array.

An item is some neighbouring queries of one row with the keys that any of them sees. Rows with few
queries (decoding, verifying drafts) make *narrow* items, whose keys several programs share; others
make *wide* items. Pure numpy over a StepBatch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...common.errors import KernelError
from ...common.ops.attention import flat_slots
from ..interface_kv import KVGroup
from ..interface_step import StepBatch

I32 = NDArray[np.int32]

TOKEN, COUNT, POSITION, FIRST, END, PAGES, PARTIAL = range(7)
"""Fields of an item: its first token in the step, how many (0: no item), the position of the first,
keys FIRST .. END - 1 of the row, where page 0 of the row would be in the list of pages, and the
first of its tokens among those of narrow items."""
FIELDS = 8


@dataclass(frozen=True, slots=True)
class TritonPlan:
    """One step of one group. `pages` lists the rows' pages one row after the other, without those
    before the first that is seen; `page_base` (R,) is where a row's page 0 would be."""

    group: KVGroup
    slots: I32  # (T,) where each new token's key and value go
    query_start: I32
    context_lens: I32
    pages: I32
    page_base: I32

    @property
    def tokens(self) -> int:
        return len(self.slots)


@dataclass(frozen=True, slots=True)
class Room:
    """What a plan's array has place for; everything that a launch's grid depends on. Its parts:
    slots, narrow items, wide items, pages. `narrow_queries` and `wide_queries` are the most queries
    of an item; with no place for wide items every row is cut into narrow ones."""

    tokens: int
    narrow: int
    wide: int
    narrow_queries: int
    wide_queries: int

    @classmethod
    def bucket(cls, rows: int, tokens: int, narrow_queries: int, wide_queries: int) -> Room:
        """For any step of at most so many rows and tokens. As many tokens as rows: a step of rows
        that decode, without a launch for wide items."""
        if tokens <= rows:
            return cls(tokens, tokens, 0, narrow_queries, wide_queries)
        # Every row may end in an item that is not full; so may the padding.
        wide = tokens // wide_queries + rows + 1
        return cls(tokens, rows, wide, narrow_queries, wide_queries)

    @property
    def partial_tokens(self) -> int:
        """Tokens of narrow items, at most."""
        return min(self.tokens, self.narrow * self.narrow_queries)

    @property
    def pages_at(self) -> int:
        return self.tokens + (self.narrow + self.wide) * FIELDS


def plan_step(batch: StepBatch, group: KVGroup) -> TritonPlan:
    table, size = batch.page_tables[group.name], group.page_size
    slots = flat_slots(table, batch.query_start, batch.context_lens, size)
    ends = batch.context_lens + np.diff(batch.query_start)
    first = np.maximum(0, batch.context_lens - group.window + 1) if group.window else 0 * ends
    first_page, last_page = first // size, (ends - 1) // size
    columns = np.arange(table.shape[1])
    used = (columns >= first_page[:, None]) & (columns <= last_page[:, None])
    counts = last_page - first_page + 1
    return TritonPlan(
        group,
        slots.astype(np.int32),
        batch.query_start.astype(np.int32),
        batch.context_lens.astype(np.int32),
        table[used].astype(np.int32),
        (np.cumsum(counts) - counts - first_page).astype(np.int32),
    )


def exact_room(plan: TritonPlan, narrow_queries: int, wide_queries: int) -> Room:
    """No padding, and no launch that has nothing to do."""
    new = np.diff(plan.query_start)
    few = new <= narrow_queries
    wide = int(np.sum(-(-new[~few] // wide_queries)))
    return Room(plan.tokens, int(few.sum()), wide, narrow_queries, wide_queries)


def pack(plan: TritonPlan, room: Room) -> I32:
    """The array of a step in a room: padding tokens go to slot 0 of the null page and see nothing,
    so that their result is zero; items left over have no queries. Raises KernelError."""
    if plan.tokens > room.tokens:
        raise KernelError(f"A step of {plan.tokens} tokens does not fit a room for {room.tokens}.")
    new = np.diff(plan.query_start)
    few = new <= room.narrow_queries if room.wide else np.ones(len(new), bool)
    narrow = _items(plan, np.flatnonzero(few), room.narrow_queries)
    wide = _items(plan, np.flatnonzero(~few), room.wide_queries)
    counts = narrow[:, COUNT]
    narrow[:, PARTIAL] = np.cumsum(counts) - counts
    if room.wide:
        wide = np.concatenate((wide, _padding(plan, room.tokens, room.wide_queries)))
    else:
        padding = _padding(plan, room.tokens, room.narrow_queries)
        narrow = np.concatenate((narrow, padding))
    slots = np.zeros(room.tokens, np.int32)
    slots[: plan.tokens] = plan.slots
    parts = (slots, _filled(narrow, room.narrow, "narrow"), _filled(wide, room.wide, "wide"))
    return np.concatenate((*parts, plan.pages))


def _items(plan: TritonPlan, rows: NDArray[np.intp], most: int) -> I32:
    """(n, FIELDS) for the queries of some rows, `most` at a time."""
    new = np.diff(plan.query_start)[rows]
    counts = -(-new // most)
    row = np.repeat(rows, counts)
    begin = (np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)) * most
    items = np.zeros((len(row), FIELDS), np.int32)
    items[:, TOKEN] = plan.query_start[row] + begin
    items[:, COUNT] = np.minimum(np.repeat(new, counts) - begin, most)
    items[:, POSITION] = plan.context_lens[row] + begin
    if plan.group.window:
        items[:, FIRST] = np.maximum(0, items[:, POSITION] - plan.group.window + 1)
    items[:, END] = items[:, POSITION] + items[:, COUNT]
    items[:, PAGES] = plan.page_base[row]
    return items


def _padding(plan: TritonPlan, tokens: int, most: int) -> I32:
    """Items without keys for the tokens of a room that a step leaves over."""
    begin = np.arange(plan.tokens, tokens, most)
    items = np.zeros((len(begin), FIELDS), np.int32)
    items[:, TOKEN] = begin
    items[:, COUNT] = np.minimum(tokens - begin, most)
    return items


def _filled(items: I32, places: int, what: str) -> I32:
    if len(items) > places:
        raise KernelError(f"A step has {len(items)} {what} items, its room {places}.")
    result = np.zeros((places, FIELDS), np.int32)
    result[: len(items)] = items
    return result.reshape(-1)
