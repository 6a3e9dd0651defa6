"""Where compressed entries lie in pages: shared by the contracts that write and read them.

With ratio r, entry w stands for tokens w * r .. (w + 1) * r - 1 of its row. It is complete with its
last token t = (w + 1) * r - 1 and lies in that token's page t // page_size, at row
(t % page_size) // r of the page. A page has ceil(page_size / r) rows, so any page size serves any
ratio. The query at position p sees the entries below (p + 1) // r.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .contract import F32, I32, I64, normal


def entries_per_page(page_size: int, ratio: int) -> int:
    return -(-page_size // ratio)


def entry_slots(pages: I32, entries: NDArray[Any], ratio: int, page_size: int) -> I64:
    """Slot (page * entries per page + row) of each entry of one row with these `pages` (P,)."""
    last = (np.asarray(entries, np.int64) + 1) * ratio - 1
    rows = entries_per_page(page_size, ratio)
    return pages[last // page_size] * np.int64(rows) + last % page_size // ratio


@dataclass(frozen=True, slots=True)
class PagedRows:
    """Rows of a case, (context, new tokens) each, with pages in shuffled order; page 0 and two
    others belong to nobody."""

    name: str
    rows: tuple[tuple[int, int], ...]
    page_size: int = 16

    @property
    def tokens(self) -> int:
        return sum(new for _, new in self.rows)

    @property
    def pages(self) -> int:
        return sum(self._counts()) + 3

    def _counts(self) -> list[int]:
        return [-(-(context + new) // self.page_size) for context, new in self.rows]

    def where(self) -> dict[str, I32]:
        new = [new for _, new in self.rows]
        return {
            "query_start": np.concatenate(([0], np.cumsum(new))).astype(np.int32),
            "context_lens": np.array([context for context, _ in self.rows], np.int32),
        }

    def table(self, rng: np.random.Generator) -> I32:
        """(R, P) with a column that no row needs."""
        counts = self._counts()
        order = rng.permutation(np.arange(1, self.pages))
        table = np.zeros((len(counts), max(counts, default=0) + 1), np.int32)
        for row, count in enumerate(counts):
            table[row, :count] = order[sum(counts[:row]) : sum(counts[:row]) + count]
        return table

    def entries(self, rng: np.random.Generator, table: I32, ratio: int, dim: int, done: str) -> F32:
        """Pages of entries; NaN where there is none. `done`: "before" the step, or "behind" it."""
        size = self.page_size
        cache = np.full((self.pages * entries_per_page(size, ratio), dim), np.nan, np.float32)
        for row, (context, new) in enumerate(self.rows):
            seen = np.arange((context + (new if done == "behind" else 0)) // ratio)
            cache[entry_slots(table[row], seen, ratio, size)] = normal(rng, len(seen), dim)
        return cache
