"""The pages of one cache group: which are free, which the tree could give up, which rows use."""

from __future__ import annotations

from typing import Generic, TypeVar

from ...platforms.interface_kv import KVGroup
from ..errors import CacheCorrupted

Holder = TypeVar("Holder")


class PagePool(Generic[Holder]):
    """Reference counts by running rows, and who else keeps a page (the tree's node, or nobody).

    A page is *free* (no row, no holder), *evictable* (a holder, no row) or *pinned* (a row uses
    it). Page 0 is the null page and is never handed out. Every misuse raises CacheCorrupted.
    """

    def __init__(self, group: KVGroup) -> None:
        self.group = group
        self._rows = [0] * group.pages
        self._holders: list[Holder | None] = [None] * group.pages
        self._free = list(range(group.pages - 1, 0, -1))
        self._evictable = 0
        self._pinned = 0

    @property
    def total(self) -> int:
        return self.group.pages - 1

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def evictable(self) -> int:
        return self._evictable

    @property
    def pinned(self) -> int:
        return self._pinned

    @property
    def available(self) -> int:
        """Pages that can be had now, after eviction."""
        return len(self._free) + self._evictable

    def rows(self, page: int) -> int:
        return self._rows[page]

    def holder(self, page: int) -> Holder | None:
        return self._holders[page]

    def take(self, count: int) -> list[int]:
        """Hand out `count` free pages to one row; the caller evicts first if too few are free."""
        if count > len(self._free):
            self._fail(f"{count} pages were taken with {len(self._free)} free")
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            if self._rows[page] or self._holders[page] is not None:
                self._fail(f"page {page} was on the free list while in use")
            self._rows[page] = 1
        self._pinned += count
        return pages

    def retain(self, page: int) -> None:
        """One more row uses a page that somebody already keeps."""
        if self._rows[page] == 0:
            if self._holders[page] is None:
                self._fail(f"page {page} was shared while free")
            self._evictable -= 1
            self._pinned += 1
        self._rows[page] += 1

    def release(self, page: int) -> None:
        """One row less uses the page."""
        if self._rows[page] == 0:
            self._fail(f"page {page} was released more often than it was used")
        self._rows[page] -= 1
        if self._rows[page] == 0:
            self._pinned -= 1
            if self._holders[page] is None:
                self._free.append(page)
            else:
                self._evictable += 1

    def keep(self, page: int, holder: Holder) -> None:
        """The tree keeps a page that a row uses, also after the row has gone."""
        if self._rows[page] == 0 or self._holders[page] is not None:
            self._fail(f"page {page} cannot be kept: it is free or already kept")
        self._holders[page] = holder

    def drop(self, page: int) -> None:
        """The tree gives the page up; it is free unless a row uses it."""
        if self._holders[page] is None:
            self._fail(f"page {page} was dropped but nobody kept it")
        self._holders[page] = None
        if self._rows[page] == 0:
            self._evictable -= 1
            self._free.append(page)

    def check(self) -> None:
        """free + evictable + pinned = total; constant time, called at every step."""
        if min(self._evictable, self._pinned) < 0 or self.available + self._pinned != self.total:
            self._fail(
                f"{self.free} free + {self._evictable} evictable + {self._pinned} pinned pages "
                f"are not {self.total}"
            )

    def _fail(self, what: str) -> None:
        raise CacheCorrupted(f"Cache group {self.group.name!r}: {what}. This is a bug; report it.")
