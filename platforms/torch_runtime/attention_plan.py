"""The host side of the generic attention backend: which rows attend together, and to what.

Pure numpy over a StepBatch; the same for every device. Positions are counted from a row's start.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...common.ops.attention import flat_slots
from ..interface_kv import KVGroup
from ..interface_step import StepBatch

I64 = NDArray[np.int64]

QUERY_BLOCK = 512
"""Queries that share one mask of (QUERY_BLOCK, keys); bounds the mask's memory."""

PADDING = 1.25
"""A decode block's longest row has at most this many times the pages of its shortest, plus one."""


@dataclass(frozen=True, slots=True)
class DecodeBlock:
    """Rows with one new token, gathered as a rectangle of equally many pages per row.

    Of the gathered tokens of each row, `first` to `last` enter attention. `seen` holds for every
    row the begin and end (exclusive) of what it may see; None when that is all of first..last.
    """

    tokens: I64  # (n,) which of the step's tokens these rows are
    pages: I64  # (n * pages per row,)
    first: int
    last: int
    seen: tuple[I64, I64] | None
    everything: bool  # these are all of the step's tokens, in order


@dataclass(frozen=True, slots=True)
class Piece:
    """A block of a row's queries and the keys that any of them sees. Queries count from the row's
    first new token; keys from the first gathered token (or from the first new token)."""

    query_first: int
    query_last: int
    key_first: int
    key_last: int
    offset: int  # query 0 of the piece is at the position of key `offset` of the piece
    causal: bool  # query i sees keys 0..i and the piece is square

    @property
    def query_count(self) -> int:
        return self.query_last - self.query_first

    @property
    def key_count(self) -> int:
        return self.key_last - self.key_first


@dataclass(frozen=True, slots=True)
class PrefillRow:
    """A row with several new tokens. `pages` is what to gather, or None to use the step's own
    keys and values."""

    start: int  # its first token in the step
    pages: I64 | None
    pieces: tuple[Piece, ...]
    window: int
    tree: NDArray[np.bool_] | None = None  # (new, new): which new tokens see which


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    group: str
    slots: I64  # (T,) where each new token's key and value go
    fresh: I64  # pages that are begun by this step and not filled by it
    decodes: tuple[DecodeBlock, ...]
    prefills: tuple[PrefillRow, ...]


def plan_attention(batch: StepBatch, group: KVGroup, block_tokens: int) -> AttentionPlan:
    """`block_tokens` bounds the gathered tokens of a decode block (one row is always allowed)."""
    table = batch.page_tables[group.name]
    new = np.diff(batch.query_start)
    ends = batch.context_lens + new
    slots = flat_slots(table, batch.query_start, batch.context_lens, group.page_size)
    last_page = (ends - 1) // group.page_size
    begun = (last_page * group.page_size >= batch.context_lens) & (ends % group.page_size != 0)
    rows = np.flatnonzero(begun)
    fresh = table[rows, last_page[rows]].astype(np.int64)
    single = np.flatnonzero(new == 1)
    decodes = _decode_blocks(batch, group, table, single, block_tokens)
    prefills = tuple(_prefill_row(batch, group, table, int(row)) for row in np.flatnonzero(new > 1))
    return AttentionPlan(group.name, slots, fresh, decodes, prefills)


def _decode_blocks(
    batch: StepBatch, group: KVGroup, table: NDArray[np.int32], rows: I64, block_tokens: int
) -> tuple[DecodeBlock, ...]:
    size = group.page_size
    ends = batch.context_lens[rows].astype(np.int64) + 1
    begins = np.maximum(0, ends - group.window) if group.window else np.zeros_like(ends)
    first_page = begins // size
    counts = (ends - 1) // size + 1 - first_page
    order = np.argsort(counts, kind="stable")
    blocks = []
    at = 0
    while at < len(order):
        stop = at + 1
        least = counts[order[at]]
        while stop < len(order):
            most = counts[order[stop]]
            if most > PADDING * least + 1 or (stop + 1 - at) * most * size > block_tokens:
                break
            stop += 1
        part = np.sort(order[at:stop])
        width = int(counts[part].max())
        # Padding repeats the row's own last page: whatever it holds is finite if the row is.
        column = first_page[part, None] + np.minimum(np.arange(width), counts[part, None] - 1)
        pages = table[rows[part, None], column].astype(np.int64).reshape(-1)
        skipped = first_page[part] * size
        seen = (begins[part] - skipped, ends[part] - skipped)
        first, last = int(seen[0].min()), int(seen[1].max())
        same = bool((seen[0] == first).all() and (seen[1] == last).all())
        tokens = batch.query_start[rows[part]].astype(np.int64)
        whole = len(tokens) == len(batch.token_ids)
        blocks.append(DecodeBlock(tokens, pages, first, last, None if same else seen, whole))
        at = stop
    return tuple(blocks)


def _prefill_row(
    batch: StepBatch, group: KVGroup, table: NDArray[np.int32], row: int
) -> PrefillRow:
    start, stop = (int(batch.query_start[row + i]) for i in (0, 1))
    context, new, window = int(batch.context_lens[row]), stop - start, group.window
    tree = None if batch.tree_mask is None else batch.tree_mask[start:stop, :new]
    if tree is None and context == 0 and (window == 0 or new <= window):
        return PrefillRow(start, None, (Piece(0, new, 0, new, 0, True),), window)
    pages, base = None, 0
    if context:
        size = group.page_size
        begin = max(0, context - window + 1) if window else 0
        base = begin // size * size
        pages = table[row, begin // size : (context + new - 1) // size + 1].astype(np.int64)
    pieces = []
    for query in range(0, new, QUERY_BLOCK):
        query_last = min(query + QUERY_BLOCK, new)
        position = context + query
        key = max(base, position - window + 1) if window else base
        key_first, key_last = key - base, context + query_last - base
        pieces.append(Piece(query, query_last, key_first, key_last, position - key, False))
    return PrefillRow(start, pages, tuple(pieces), window, tree)
