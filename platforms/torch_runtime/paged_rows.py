"""A step as rows of pages, for attention that reads pages in place: the host side of adapters to
libraries, which all want a page table or a list of pages, and lengths. Pure numpy.

A row begins at the first page that any of its queries sees: pages that a window has released are
not listed, so that a kernel which multiplies what it masks by zero never meets what is in them.
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


@dataclass(frozen=True, slots=True)
class PagedRows:
    """One step of one group: R rows, T new tokens."""

    group: KVGroup
    slots: I32  # (T,) where each new token's key and value go
    query_start: I32  # (R+1,)
    table: I32  # (R, P) pages from a row's first visible one on; 0 = padding
    keys: I32  # (R,) tokens in these pages, the new ones included; at least 1

    @property
    def rows(self) -> int:
        return len(self.keys)

    @property
    def tokens(self) -> int:
        return len(self.slots)

    @property
    def decodes(self) -> bool:
        """Every row has one new token."""
        return self.tokens == self.rows

    @property
    def longest_query(self) -> int:
        return int(np.diff(self.query_start).max())

    @property
    def page_counts(self) -> I32:
        return (-(-self.keys // self.group.page_size)).astype(np.int32)

    def page_list(self) -> tuple[I32, I32, I32]:
        """(R+1,) where each row's pages begin, all rows' pages, tokens in each row's last page."""
        counts = self.page_counts
        start = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
        pages = self.table[np.arange(self.table.shape[1]) < counts[:, None]]
        last = self.keys - (counts - 1) * self.group.page_size
        return start, pages, last.astype(np.int32)

    def padded(self, rows: int) -> PagedRows:
        """With rows of one token on the null page, so that there are `rows` of them. For steps that
        decode. Raises KernelError when there are more."""
        more = rows - self.rows
        if more < 0 or not self.decodes:
            raise KernelError(
                f"A step of {self.rows} rows and {self.tokens} tokens does not fit buffers for "
                f"{rows} rows of one token."
            )
        return PagedRows(
            self.group,
            np.pad(self.slots, (0, more)),
            np.arange(rows + 1, dtype=np.int32),
            np.pad(self.table, ((0, more), (0, 0))),
            np.pad(self.keys, (0, more), constant_values=1),
        )


def plan_rows(batch: StepBatch, group: KVGroup) -> PagedRows:
    table, size = batch.page_tables[group.name], group.page_size
    slots = flat_slots(table, batch.query_start, batch.context_lens, size)
    ends = batch.context_lens + np.diff(batch.query_start)
    seen = np.maximum(0, batch.context_lens - group.window + 1) if group.window else 0 * ends
    first = seen // size
    counts = (ends - 1) // size + 1 - first
    columns = np.arange(int(counts.max()))
    listed = columns < counts[:, None]
    rows = np.arange(batch.rows)[:, None]
    pages = table[rows, np.where(listed, first[:, None] + columns, 0)]
    return PagedRows(
        group,
        slots.astype(np.int32),
        batch.query_start.astype(np.int32),
        np.where(listed, pages, 0).astype(np.int32),
        (ends - first * size).astype(np.int32),
    )


def table_width(group: KVGroup, longest: int) -> int:
    """Pages that a row of `longest` tokens may list. A window's pages may begin inside one."""
    tokens = min(longest, group.window + group.page_size) if group.window else longest
    return min(group.pages, -(-tokens // group.page_size) + 1)
