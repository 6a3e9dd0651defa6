"""The cache as the scheduler sees it: sequences that grow page by page in every group, page
tables, and the prefix tree behind them."""

from __future__ import annotations

from collections.abc import Sequence as Many

import numpy as np

from ...platforms.interface_kv import I32, KVGroup, KVKind
from ..errors import CacheCorrupted, ConfigError
from .pages import PagePool
from .prefix_tree import Match, Node, PrefixTree
from .sequence import Sequence
from .states import States


class KVCache:
    """Pools, tables and tree of all groups. `tables[g]` is (max_rows, P) int32, 0 = no page; of a
    recurrent group (max_rows, 2), the working slots and those of kept states. All other groups are
    `paged`."""

    def __init__(
        self,
        groups: Many[KVGroup],
        max_rows: int,
        max_context: int,
        prefix_cache: bool = True,
        eviction: str = "lru",
    ) -> None:
        check_groups(groups, max_rows)
        self.groups = tuple(groups)
        self.page_size = groups[0].page_size
        self.prefix_cache = prefix_cache
        self.pools: list[PagePool[Node]] = [PagePool(group) for group in groups]
        self.tree = PrefixTree(self.pools, eviction)
        self.recurrent = [g for g, group in enumerate(groups) if group.kind is KVKind.RECURRENT]
        self.paged = [g for g in range(len(groups)) if g not in self.recurrent]
        self._width = -(-max_context // self.page_size)
        self.tables: list[I32] = [
            np.zeros((max_rows, 2 if g in self.recurrent else self._width), np.int32)
            for g in range(len(groups))
        ]
        self.states = States(self.recurrent, self.pools, self.tree, self.tables)
        self._max_rows = max_rows
        self._handles = list(range(max_rows - 1, -1, -1))
        self._windows = [g for g, group in enumerate(groups) if group.kind is KVKind.WINDOW]

    # ---- sizes

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def pages_alone(self, group: int, tokens: int) -> int:
        """Pages of a paged group that a sequence of `tokens` holds at most, computed one by one."""
        spec, pages = self.groups[group], self.pages_for(tokens)
        if spec.kind.keeps_all:
            return pages
        return min(pages, (spec.window + self.page_size - 2) // self.page_size + 1)

    def pages_ahead(self, group: int, tokens: int, have: int) -> int:
        """Pages of `group` that a sequence with `have` slots still needs up to `tokens`."""
        return min(max(0, self.pages_for(tokens) - have), self.pages_alone(group, tokens))

    @property
    def capacity(self) -> int:
        """Tokens of the longest sequence that fits into the pools alone."""
        capacity = self._width * self.page_size
        for g in self.paged:
            if self.pages_alone(g, capacity) > self.pools[g].total:
                capacity = self.pools[g].total * self.page_size
        return capacity

    def room(self) -> int:
        """Pages that can be had now in every group. States alone bound nothing but the length."""
        pages = (self.pools[g].available for g in self.paged)
        return min(pages, default=self._max_rows * self._width)

    # ---- a sequence's life

    def open(self) -> Sequence:
        if not self._handles:
            raise CacheCorrupted("More sequences were opened than rows exist. This is a bug.")
        sequence = Sequence(self._handles.pop(), len(self.groups), self.tree.root)
        self.tree.attach(sequence.node)
        self.states.open(sequence.handle)
        return sequence

    def match(self, node: Node, tokens: I32) -> Match:
        """What the tree has of `tokens` below `node`; the last token is left to compute."""
        if not self.prefix_cache:
            return Match([], 0)
        return self.tree.extend(node, tokens, (len(tokens) - 1) // self.page_size)

    def awaits(self, sequence: Sequence, tokens: I32, computed: int) -> bool:
        """Whether the step under construction will leave a state from which `sequence` can go on
        later than from where it is (`computed`) or could be now."""
        promised = self.states.promised(tokens)
        if promised <= computed:
            return False
        nodes = self.match(sequence.node, tokens).nodes
        return not nodes or nodes[-1].depth * self.page_size < promised

    def next_snapshot(self, length: int, computed: int, reach: int) -> int:
        """The next token count at which a prompt of `length` tokens should leave a snapshot, 0 for
        none: where it leaves what the tree knows (`reach`), since prompts branch there, and at the
        last boundary before its last token, for the same prompt again."""
        if self.recurrent and self.prefix_cache and self.states.has_room:
            for depth in (reach, (length - 1) // self.page_size):
                if depth * self.page_size > computed:
                    return depth * self.page_size
        return 0

    def unused(self, group: int, nodes: Many[Node]) -> int:
        """How many evictable pages of a paged group adopting `nodes` would pin."""
        if not nodes:
            return 0
        first = self.tree.first_needed(group, nodes[-1].depth)
        rows = self.pools[group].rows
        return sum(1 for n in nodes if n.depth > first and rows(n.pages[group]) == 0)

    def adopt(self, sequence: Sequence, nodes: Many[Node], priority: int) -> None:
        """Continue `sequence` after its node with matched pages and state; a page of its own that
        it has begun there is given back."""
        self.tree.tick()
        start, end = sequence.node.depth, nodes[-1].depth
        for g in self.paged:
            self._release(sequence, g, start, sequence.pages)
            first = max(start, self.tree.first_needed(g, end))
            needed = [self.tree.retain(g, node) for node in nodes[first - start :]]
            self.tables[g][sequence.handle, first:end] = needed
        self.states.restore(sequence.handle, nodes[-1])
        for node in nodes:
            node.hits += 1
            node.priority = max(node.priority, priority)
        sequence.pages = end
        self._move(sequence, nodes[-1])
        self.slide(sequence, end * self.page_size)

    def grow(self, sequence: Sequence, count: int) -> bool:
        """Add `count` fresh pages in every group, giving up cached ones; all or nothing."""
        if self.room() < count:
            return False
        for g in self.paged:
            pool = self.pools[g]
            while pool.free < count:
                if not self.tree.evict(g):
                    raise CacheCorrupted(
                        f"Cache group {pool.group.name!r}: {pool.evictable} pages count as "
                        f"evictable and none can be given up. This is a bug; report it."
                    )
        start, end = sequence.pages, sequence.pages + count
        for g in self.paged:
            self.tables[g][sequence.handle, start:end] = self.pools[g].take(count)
        sequence.pages = end
        return True

    def slide(self, sequence: Sequence, computed: int) -> None:
        """Release window pages that no position from `computed` on can see."""
        size = self.page_size
        for g in self._windows:
            first = max(0, computed - self.groups[g].window + 1) // size
            if first > sequence.first[g]:
                self._release(sequence, g, sequence.first[g], first)
                sequence.first[g] = first

    def publish(
        self, sequence: Sequence, tokens: I32, priority: int, may_swap: bool = True
    ) -> None:
        """Enter the full pages of `tokens` (known, and scheduled to be computed) into the tree.

        Where the tree has a page for the same tokens already, the sequence changes over to it and
        gives its own back; with `may_swap` False it stops there instead (its own page is still to
        be written by the step under construction).
        """
        node, end = sequence.node, len(tokens) // self.page_size
        if not self.prefix_cache or node.depth >= end:
            return
        size = self.page_size
        self.tree.tick()
        for index in range(node.depth, end):
            key = tokens[index * size : (index + 1) * size].tobytes()
            child = node.children.get(key)
            if child is None:
                mine = [0] * len(self.groups)
                for g in self.paged:
                    mine[g] = int(self.tables[g][sequence.handle, index])
                child = self.tree.add(node, key, mine)
            elif may_swap:
                self._swap(sequence, child, index)
            else:
                break
            child.priority = max(child.priority, priority)
            node = child
        self._move(sequence, node)

    def close(self, sequence: Sequence) -> None:
        """Release all that the sequence holds; the tree keeps what was published."""
        self.tree.tick()
        for g in self.paged:
            self._release(sequence, g, sequence.first[g], sequence.pages)
            self.tables[g][sequence.handle] = 0
        self.states.close(sequence.handle)
        self.tree.detach(sequence.node)
        self._handles.append(sequence.handle)

    def check(self) -> None:
        for pool in self.pools:
            pool.check()

    def clear(self) -> None:
        """Forget every prefix that no row uses."""
        self.tree.clear()

    def _move(self, sequence: Sequence, node: Node) -> None:
        if node is not sequence.node:
            self.tree.attach(node)
            self.tree.detach(sequence.node)
            sequence.node = node

    def _swap(self, sequence: Sequence, node: Node, index: int) -> None:
        for g in self.paged:
            table = self.tables[g]
            mine, theirs = int(table[sequence.handle, index]), node.pages[g]
            if not mine or mine == theirs:
                continue
            if theirs:
                table[sequence.handle, index] = self.tree.retain(g, node)
                self.tree.release(g, mine)
            else:
                self.tree.keep(node, g, mine)

    def _release(self, sequence: Sequence, group: int, start: int, end: int) -> None:
        line = self.tables[group][sequence.handle]
        for page in line[start:end].tolist():
            if page:
                self.tree.release(group, page)
        line[start:end] = 0


def check_groups(groups: Many[KVGroup], max_rows: int) -> None:
    """Raises ConfigError for impossible sizes."""
    if not groups:
        raise ConfigError("The executor reports no cache group; a model needs at least one.")
    for group in groups:
        if group.page_size < 1 or group.page_size != groups[0].page_size:
            raise ConfigError(
                f"Cache group {group.name!r}: the page size must be one for all groups."
            )
        if group.pages < 2:
            raise ConfigError(
                f"Cache group {group.name!r} has {group.pages} pages; it needs the null page and "
                f"at least one more."
            )
        if group.kind is KVKind.WINDOW and group.window < 1:
            raise ConfigError(f"Cache group {group.name!r}: the window must be at least 1.")
        if group.kind is KVKind.RECURRENT and group.pages - 1 < max_rows:
            raise ConfigError(
                f"Cache group {group.name!r} has {group.pages - 1} state slots; {max_rows} rows "
                f"need one each. Raise the memory for the cache, or lower max_rows."
            )
