"""One tree over pages of tokens for all cache groups: what is cached, how deep a prompt matches,
what is given up first.

A node stands for one page of tokens after its parent's; per group it has the page that holds their
keys and values, or none (0). A FULL group's page lives as long as its node; a WINDOW group's page
can be given up alone, since a match needs only the pages of the last `window - 1` tokens. So can a
RECURRENT group's: a snapshot of the state after the node's tokens, which is all that a match needs.

Rows attach to the deepest node of their own prefix. A node with children or attached rows stays, so
every FULL page without a row can be given up leaf by leaf. Leaves that lack what another group has
to have there serve no prompt and go first, whatever the policy says of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush
from typing import NamedTuple

from ...platforms.interface_kv import I32, KVKind
from .pages import PagePool

Key = tuple[int, ...]


class Node:
    __slots__ = (
        "children",
        "depth",
        "hits",
        "key",
        "pages",
        "parent",
        "priority",
        "queued",
        "rows",
        "serial",
        "used",
    )

    def __init__(self, parent: Node | None, key: bytes, groups: int, serial: int) -> None:
        self.parent = parent
        self.key = key  # the page's tokens, int32 bytes
        self.depth: int = 0 if parent is None else parent.depth + 1  # pages from the root
        self.serial = serial
        self.children: dict[bytes, Node] = {}
        self.pages = [0] * groups
        self.used: list[int] = [
            0
        ] * groups  # the tree's clock when a row last took or released the page
        self.queued = [False] * (groups + 1)  # has an entry in the group's eviction heap, the idle
        self.rows = 0  # rows attached here
        self.hits: int = 0  # matches that went through here
        self.priority: int = 0  # highest priority of a request that used it


# Each key only grows with time, so an outdated heap entry is too small, never too large.
POLICIES: dict[str, Callable[[Node, int], Key]] = {
    "lru": lambda node, group: (node.used[group],),
    "lfu": lambda node, group: (node.hits, node.used[group]),
    "priority": lambda node, group: (node.priority, node.used[group]),
}

Pool = PagePool[Node]


class Match(NamedTuple):
    """`nodes` can serve the next tokens; the tree knows the tokens down to depth `reach`, which is
    deeper where some group lacks what a row would need there."""

    nodes: list[Node]
    reach: int


class PrefixTree:
    """Owns the nodes; the pools own the pages' accounting."""

    def __init__(self, pools: Sequence[Pool], policy: str) -> None:
        self.pools = pools
        self.page_size = pools[0].group.page_size
        self.root = Node(None, b"", len(pools), 0)
        self._policy = POLICIES[policy]
        self._kinds = [pool.group.kind for pool in pools]
        full = [g for g, kind in enumerate(self._kinds) if kind.keeps_all]
        self._full = full[0] if full else None  # groups that keep all share the heap of the first
        self._windows = [g for g, kind in enumerate(self._kinds) if kind is KVKind.WINDOW]
        self._recurrent = [g for g, kind in enumerate(self._kinds) if kind is KVKind.RECURRENT]
        self._idle = len(pools)  # the heap of leaves that serve no prompt, behind those of groups
        self._heaps: list[list[tuple[Key, int, int, Node]]] = [[] for _ in range(len(pools) + 1)]
        self._serial = 0
        self._clock = 0

    def tick(self) -> None:
        """Advance the clock of `used`: once per event of a row."""
        self._clock += 1

    # ---- matching

    def first_needed(self, group: int, depth: int) -> int:
        """The first page of a paged group that a row standing at the boundary after
        `depth` pages still reads."""
        spec = self.pools[group].group
        if spec.kind.keeps_all:
            return 0
        return max(0, depth * spec.page_size - spec.window + 1) // spec.page_size

    def extend(self, node: Node, tokens: I32, limit: int) -> Match:
        """What continues `tokens` (the whole sequence, int32) below `node`, at most down to depth
        `limit`, for a row that has what `node` needs."""
        size = self.page_size
        windows, recurrent = self._windows, self._recurrent
        gaps = [0] * len(self.pools)  # depth just after the last page that is missing
        found: list[Node] = []
        served = 0
        while node.depth < limit:
            start = node.depth * size
            child = node.children.get(tokens[start : start + size].tobytes())
            if child is None:
                break
            found.append(child)
            for g in windows:
                if not child.pages[g]:
                    gaps[g] = child.depth
            if all(self.first_needed(g, child.depth) >= gaps[g] for g in windows) and all(
                child.pages[g] for g in recurrent
            ):
                served = len(found)
            node = child
        return Match(found[:served], node.depth)

    # ---- growing

    def add(self, parent: Node, key: bytes, pages: list[int]) -> Node:
        """A new node for one page of tokens, keeping `pages` (per group; 0 = none)."""
        self._serial += 1
        node = Node(parent, key, len(self.pools), self._serial)
        parent.children[key] = node
        for g, page in enumerate(pages):
            if page:
                self.keep(node, g, page)
        return node

    def keep(self, node: Node, group: int, page: int) -> None:
        """Give `node` the page of `group` that it lacks."""
        self.pools[group].keep(page, node)
        node.pages[group] = page
        node.used[group] = self._clock

    def attach(self, node: Node) -> None:
        node.rows += 1

    def detach(self, node: Node) -> None:
        node.rows -= 1
        self._offer_leaf(node)
        self._prune(node)

    def retain(self, group: int, node: Node) -> int:
        """One more row uses the node's page; returns the page."""
        page = node.pages[group]
        self.pools[group].retain(page)
        node.used[group] = self._clock
        return page

    def touch(self, group: int, node: Node) -> int:
        """A row reads the node's page once and does not keep it; returns the page."""
        node.used[group] = self._clock
        return node.pages[group]

    def release(self, group: int, page: int) -> None:
        """A row gives back a page, its own or the tree's."""
        pool = self.pools[group]
        pool.release(page)
        node = pool.holder(page)
        if node is not None:
            node.used[group] = self._clock
            if not self._kinds[group].keeps_all:
                self._queue(group, node)

    # ---- giving up

    def evict(self, group: int) -> bool:
        """Free at least one page of `group`; False when none can be given up."""
        if not self._kinds[group].keeps_all:
            return self._evict_alone(group)
        if self._full is None:
            return False
        node = self._pop(self._idle) or self._pop(self._full)
        if node is None:
            return False
        self._remove(node)
        return True

    def _evict_alone(self, group: int) -> bool:
        node = self._pop(group)
        if node is None:
            return False
        self._drop(node, group)
        self._offer_below(node, group)
        self._prune(node)
        return True

    def clear(self) -> None:
        """Give up everything that no row uses."""
        for g in range(len(self.pools)):
            while self.evict(g):
                pass

    def serves(self, node: Node) -> bool:
        """Whether a row could go on after `node`: snapshots and windows are there."""
        if not all(node.pages[g] for g in self._recurrent):
            return False
        for g in self._windows:
            at: Node | None = node
            for _ in range(node.depth - self.first_needed(g, node.depth)):
                if at is None or not at.pages[g]:
                    return False
                at = at.parent
        return True

    def _offer_leaf(self, node: Node) -> None:
        if self._full is not None and self._removable(node):
            self._queue(self._full, node)
            if not self.serves(node):
                self._queue(self._idle, node)

    def _offer_below(self, node: Node, group: int) -> None:
        """`node` has lost its page of `group`: leaves that need it serve no more."""
        window = self._kinds[group] is KVKind.WINDOW
        changed = [node]
        while changed:
            each = changed.pop()
            self._offer_leaf(each)
            if window and self.first_needed(group, each.depth + 1) < node.depth:
                changed += each.children.values()

    def _removable(self, node: Node) -> bool:
        return not node.children and not node.rows and node.parent is not None

    def _group(self, heap: int) -> int:
        """Whose pages a heap gives up."""
        return self._full if heap == self._idle and self._full is not None else heap

    def _evictable(self, heap: int, node: Node) -> bool:
        group = self._group(heap)
        page = node.pages[group]
        if not page or self.pools[group].holder(page) is not node or self.pools[group].rows(page):
            return False
        if not self._kinds[group].keeps_all:
            return True
        return self._removable(node) and not (heap == self._idle and self.serves(node))

    def _queue(self, heap: int, node: Node) -> None:
        if not node.queued[heap] and self._evictable(heap, node):
            node.queued[heap] = True
            group = self._group(heap)
            entry = (self._policy(node, group), node.depth, node.serial, node)
            heappush(self._heaps[heap], entry)
            if len(self._heaps[heap]) > 2 * self.pools[group].group.pages:
                self._compact(heap)

    def _pop(self, heap: int) -> Node | None:
        """The first node in eviction order. Entries are checked when they come up: one that is in
        use again is dropped (its release queues it anew), one used since is put back."""
        group, entries = self._group(heap), self._heaps[heap]
        while entries:
            key, _, _, node = heappop(entries)
            node.queued[heap] = False
            if self._evictable(heap, node):
                if key == self._policy(node, group):
                    return node
                self._queue(heap, node)
        return None

    def _compact(self, heap: int) -> None:
        """Drop outdated entries (of nodes removed through another group): bounds the heap."""
        for *_, node in self._heaps[heap]:
            node.queued[heap] = self._evictable(heap, node)
        self._heaps[heap] = [entry for entry in self._heaps[heap] if entry[3].queued[heap]]
        heapify(self._heaps[heap])

    def _drop(self, node: Node, group: int) -> None:
        page, node.pages[group] = node.pages[group], 0
        self.pools[group].drop(page)

    def _remove(self, node: Node) -> None:
        parent = node.parent
        if parent is None:
            return
        for g, page in enumerate(node.pages):
            if page:
                self._drop(node, g)
        del parent.children[node.key]
        self._offer_leaf(parent)

    def _prune(self, node: Node) -> None:
        """Remove nodes that hold nothing (only a model without groups that keep all has such)."""
        while self._removable(node) and not any(node.pages):
            parent = node.parent
            self._remove(node)
            if parent is None:
                return
            node = parent
