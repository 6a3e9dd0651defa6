"""The slots of recurrent groups: the working state of each row, and snapshots for the tree.

Copies are recorded in the order in which the device will carry them out: what a step needs before
it, and what is saved of a step after it, which is before the next. Nothing that a slot will hold
later can overtake a copy that is recorded already, so a slot may change hands at once, whatever is
in flight, and no slot is kept only because a copy is owed.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np

from ...platforms.interface_kv import I32
from ...platforms.interface_step import PageCopy
from ..errors import CacheCorrupted
from .prefix_tree import Node, Pool, PrefixTree
from .sequence import Sequence


@dataclass(frozen=True, slots=True)
class Promise:
    """A snapshot of the state after `tokens`, where `sequence` stands after the step under
    construction; nobody can go on from it before that step."""

    sequence: Sequence
    tokens: I32
    slots: list[int]  # one per recurrent group


class States:
    """Working slots are in column 0 of the groups' tables, in column 1 copies of them to go back to
    (`keep`). A model without recurrent groups has no
    states, and every method then does nothing."""

    def __init__(
        self, groups: list[int], pools: Many[Pool], tree: PrefixTree, tables: Many[I32]
    ) -> None:
        self._groups = groups
        self._pools = pools
        self._tree = tree
        self._tables = tables
        self._promises: list[Promise] = []
        self._moves: list[PageCopy] = []

    @property
    def has_room(self) -> bool:
        """Whether every group has a slot that is free, or an older snapshot's. Beside fewer rows
        than there may be, and no promise, it has."""
        return all(self._pools[g].available for g in self._groups)

    # ---- working slots

    def open(self, handle: int) -> None:
        """Take a slot in every group; what it holds is not reset. Only where `has_room`."""
        for g in self._groups:
            self._tables[g][handle, 0] = self._take(g)

    def close(self, handle: int) -> None:
        for g in self._groups:
            for slot in self._tables[g][handle].tolist():
                if slot:
                    self._tree.release(g, slot)
            self._tables[g][handle] = 0

    def restore(self, handle: int, node: Node) -> None:
        """Go on from the node's snapshot."""
        for g in self._groups:
            self._move(g, self._tree.touch(g, node), int(self._tables[g][handle, 0]))

    # ---- copies to go back to

    def keep(self, sequence: Sequence, computed: int, spare: int) -> bool:
        """Keep what the working slots hold now, after `computed` tokens, until the next `keep`.
        False where that would leave fewer than `spare` slots for others."""
        tables, handle = self._tables, sequence.handle
        missing = [g for g in self._groups if not tables[g][handle, 1]]
        if any(self._pools[g].available <= spare for g in missing):
            return False
        for g in missing:
            tables[g][handle, 1] = self._take(g)
        if sequence.kept_at != computed:
            for g in self._groups:
                self._move(g, int(tables[g][handle, 0]), int(tables[g][handle, 1]))
            sequence.kept_at = computed
        return True

    def take_back(self, sequence: Sequence) -> int:
        """Go on from the kept copy; returns after how many tokens it was made."""
        if sequence.kept_at < 0:
            raise CacheCorrupted("A state was taken back that was not kept. This is a bug.")
        for g in self._groups:
            working, kept = self._tables[g][sequence.handle].tolist()
            self._move(g, kept, working)
        return sequence.kept_at

    # ---- snapshots

    def promise(self, sequence: Sequence, tokens: I32) -> None:
        """The step under construction brings `sequence` to the end of `tokens`, a page boundary:
        `settle` enters a snapshot there. Only where `has_room`."""
        slots = [self._take(g) for g in self._groups]
        self._promises.append(Promise(sequence, tokens, slots))

    def promised(self, tokens: I32) -> int:
        """How many of `tokens`, but not all, the deepest promise serves."""
        most = 0
        for promise in self._promises:
            count = len(promise.tokens)
            if most < count < len(tokens) and np.array_equal(promise.tokens, tokens[:count]):
                most = count
        return most

    def settle(self) -> None:
        """The step is built and its pages are in the tree: enter the snapshots promised. The copies
        that save them go with the next step."""
        promises, self._promises = self._promises, []
        for promise in promises:
            self._tree.tick()
            sequence = promise.sequence
            node = sequence.node
            if node.depth * self._tree.page_size != len(promise.tokens):
                raise CacheCorrupted(
                    f"A snapshot after {len(promise.tokens)} tokens met a row that stands at page "
                    f"{node.depth}. This is a bug; report it."
                )
            for g, slot in zip(self._groups, promise.slots, strict=True):
                if not node.pages[g]:
                    self._tree.keep(node, g, slot)
                    self._move(g, int(self._tables[g][sequence.handle, 0]), slot)
                self._tree.release(g, slot)

    def take_moves(self) -> tuple[PageCopy, ...]:
        """The copies recorded since the last step, for the step that is being built."""
        moves, self._moves = tuple(self._moves), []
        return moves

    def _move(self, group: int, source: int, target: int) -> None:
        self._moves.append(PageCopy(self._pools[group].group.name, source, target))

    def _take(self, group: int) -> int:
        pool = self._pools[group]
        if not pool.free and not self._tree.evict(group):
            raise CacheCorrupted(
                f"Cache group {pool.group.name!r}: no slot is free or can be given up. This is a "
                f"bug; report it."
            )
        return pool.take(1)[0]
