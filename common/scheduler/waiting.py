"""The waiting rows: highest priority first, then the order of arrival."""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from .row import Row


class WaitingQueue:
    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int], Row]] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def push(self, row: Row) -> None:
        heappush(self._heap, (row.order, row))
        self._count += 1

    def first(self) -> Row | None:
        """The row to run next; rows that ended while they waited are dropped on the way."""
        while self._heap and self._heap[0][1].done:
            heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def pop(self) -> None:
        """Remove the row that `first` returned."""
        heappop(self._heap)
        self._count -= 1

    def forget(self) -> None:
        """A waiting row has ended (`done` is set); its entry goes later."""
        self._count -= 1
        if len(self._heap) > 2 * self._count + 16:
            self._heap = [entry for entry in self._heap if not entry[1].done]
            heapify(self._heap)
