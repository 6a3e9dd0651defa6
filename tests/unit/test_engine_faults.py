"""Proves that the engine's tests can fail: with a fault put into the cache or the scheduler, the
same traffic that passes in test_engine_random must be found wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from support.engine_traffic import Wrong, serve
from support.engine_worlds import RECURRENT_SHAPES, SHAPES, crowd, talk, world

from sixfold.common.cache.kv_cache import KVCache
from sixfold.common.cache.pages import PagePool
from sixfold.common.cache.prefix_tree import Match, PrefixTree
from sixfold.common.cache.states import States
from sixfold.common.config import EngineConfig
from sixfold.common.errors import CacheCorrupted, EngineDied
from sixfold.common.scheduler import sampling
from sixfold.common.scheduler.row import Row
from sixfold.common.scheduler.scheduler import Scheduler
from sixfold.platforms.interface_kv import KVKind

Patch = Callable[[pytest.MonkeyPatch], None]
FAULTS: dict[str, Patch] = {}
RECURRENT_FAULTS: dict[str, Patch] = {}


def fault(patch: Patch) -> Patch:
    FAULTS[patch.__name__] = patch
    return patch


def recurrent_fault(patch: Patch) -> Patch:
    RECURRENT_FAULTS[patch.__name__] = patch
    return patch


def traffic(shapes: Iterable[tuple[int, ...]] = SHAPES) -> None:
    """No audit: the pools' own checks, the outputs and the final count must find the fault."""
    for number, shape in enumerate(shapes):
        rng = np.random.default_rng(number)
        info = world(4, shape, 8, 48, max_rows=6, max_step_tokens=18)
        serve(info, EngineConfig(overlap=number % 2 == 0), crowd(rng, info, 30, 20), audit=False)
        roomy = world(4, shape, 30, 64)
        for first in (8, 9, 10, 11):
            serve(roomy, EngineConfig(), talk(roomy, first), audit=False)


@fault
def page_freed_twice(patch: pytest.MonkeyPatch) -> None:
    original = PagePool.release

    def release(self: PagePool[Any], page: int) -> None:
        original(self, page)
        if page % 5 == 0:
            original(self, page)

    patch.setattr(PagePool, "release", release)


@fault
def page_given_to_two_rows(patch: pytest.MonkeyPatch) -> None:
    original = PagePool.take

    def take(self: PagePool[Any], count: int) -> list[int]:
        pages = original(self, count)
        used = [p for p in range(1, self.group.pages) if self.rows(p) and p not in pages]
        if used and pages and pages[0] % 7 == 0:
            self.release(pages[0])
            self.retain(used[0])
            pages[0] = used[0]
        return pages

    patch.setattr(PagePool, "take", take)


@fault
def page_never_given_back(patch: pytest.MonkeyPatch) -> None:
    original = KVCache._release

    def release(self: KVCache, sequence: Any, group: int, start: int, end: int) -> None:
        self.tables[group][sequence.handle, 5] = 0
        original(self, sequence, group, start, end)

    patch.setattr(KVCache, "_release", release)


@fault
def evicted_prefix_still_matches(patch: pytest.MonkeyPatch) -> None:
    original = PrefixTree._remove

    def remove(self: PrefixTree, node: Any) -> None:
        pages, parent = list(node.pages), node.parent
        original(self, node)
        ghost = self.add(parent, node.key, [0] * len(pages))
        ghost.pages = pages
        del parent.children[node.key]
        parent.children[node.key] = ghost

    patch.setattr(PrefixTree, "_remove", remove)
    patch.setattr(PagePool, "retain", _retain_anything)


def _retain_anything(self: PagePool[Any], page: int) -> None:
    """Without the pool's own guard, so that only the outputs can tell."""
    if self._rows[page] == 0:
        if self._holders[page] is None:
            self._free.remove(page)
        else:
            self._evictable -= 1
        self._pinned += 1
    self._rows[page] += 1


@fault
def other_prompt_matches(patch: pytest.MonkeyPatch) -> None:
    original = PrefixTree.extend

    def extend(self: PrefixTree, node: Any, tokens: Any, limit: int) -> Match:
        found = original(self, node, tokens, limit)
        if found.nodes or not limit or node is not self.root:
            return found
        return Match([n for n in node.children.values() if all(n.pages)][:1], found.reach)

    patch.setattr(PrefixTree, "extend", extend)


@fault
def window_released_one_token_early(patch: pytest.MonkeyPatch) -> None:
    original = KVCache.slide
    patch.setattr(KVCache, "slide", lambda self, row, computed: original(self, row, computed + 1))


@fault
def match_needs_one_window_token_less(patch: pytest.MonkeyPatch) -> None:
    def first_needed(self: PrefixTree, group: int, depth: int) -> int:
        spec = self.pools[group].group
        if spec.kind is KVKind.FULL:
            return 0
        return min(depth, max(0, depth * spec.page_size - spec.window + 2) // spec.page_size)

    patch.setattr(PrefixTree, "first_needed", first_needed)


@fault
def match_ignores_windows(patch: pytest.MonkeyPatch) -> None:
    def extend(self: PrefixTree, node: Any, tokens: Any, limit: int) -> Match:
        found, size = [], self.pools[0].group.page_size
        while node.depth < limit:
            start = node.depth * size
            node = node.children.get(tokens[start : start + size].tobytes())
            if node is None:
                break
            found.append(node)
        return Match(found, len(found))

    patch.setattr(PrefixTree, "extend", extend)
    patch.setattr(PrefixTree, "retain", _retain_if_there)


def _retain_if_there(self: PrefixTree, group: int, node: Any) -> int:
    page: int = node.pages[group]
    if page:
        self.pools[group].retain(page)
    return page


@recurrent_fault
def match_ignores_snapshots(patch: pytest.MonkeyPatch) -> None:
    original = PrefixTree.extend

    def extend(self: PrefixTree, node: Any, tokens: Any, limit: int) -> Match:
        groups, self._recurrent = self._recurrent, self._recurrent[1:]
        try:
            return original(self, node, tokens, limit)
        finally:
            self._recurrent = groups

    patch.setattr(PrefixTree, "extend", extend)


@recurrent_fault
def state_not_restored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(States, "restore", lambda self, handle, node: None)


@recurrent_fault
def snapshot_used_before_it_is_saved(patch: pytest.MonkeyPatch) -> None:
    """Entered while the step is built that brings the row there: others go on from it at once, and
    the copy is of what the slot held before."""
    promise = States.promise

    def at_once(self: States, sequence: Any, tokens: Any) -> None:
        promise(self, sequence, tokens)
        if sequence.node.depth * self._tree.page_size == len(tokens):
            self.settle()

    patch.setattr(States, "promise", at_once)


@recurrent_fault
def snapshot_of_another_row(patch: pytest.MonkeyPatch) -> None:
    original = States._move

    def move(self: States, group: int, source: int, target: int) -> None:
        original(self, group, source % self._pools[group].total + 1, target)

    patch.setattr(States, "_move", move)


@recurrent_fault
def saves_after_restores(patch: pytest.MonkeyPatch) -> None:
    original = States.take_moves
    patch.setattr(States, "take_moves", lambda self: original(self)[::-1])


@recurrent_fault
def snapshot_slot_is_a_row_s(patch: pytest.MonkeyPatch) -> None:
    original = States._take

    def take(self: States, group: int) -> int:
        used = [int(s) for s in self._tables[group][:, 0] if s]
        if len(used) < 3:
            return original(self, group)
        self._pools[group].retain(used[0])
        return used[0]

    patch.setattr(States, "_take", take)


@recurrent_fault
def slot_never_given_back(patch: pytest.MonkeyPatch) -> None:
    original = States.close

    def close(self: States, handle: int) -> None:
        slots = [int(self._tables[g][handle, 0]) for g in self._groups]
        original(self, handle)
        if handle == 1:
            for g, s in zip(self._groups, slots, strict=True):
                self._pools[g]._free.remove(s)

    patch.setattr(States, "close", close)


@fault
def page_published_before_it_is_computed(patch: pytest.MonkeyPatch) -> None:
    def publish(self: Scheduler, row: Row) -> None:
        assert row.sequence is not None
        end = row.sequence.pages * self.cache.page_size
        self.cache.publish(row.sequence, row.tokens[: min(row.known, end)], row.priority)

    patch.setattr(Scheduler, "_publish", publish)


@fault
def preempted_row_is_not_computed_again(patch: pytest.MonkeyPatch) -> None:
    original = Row.restart

    def restart(self: Row) -> None:
        computed = self.computed
        original(self)
        self.computed = computed // 8 * 4

    patch.setattr(Row, "restart", restart)


@fault
def preempted_row_keeps_its_pages(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Row, "restart", lambda self: setattr(self, "decoding", False))


@fault
def draw_depends_on_the_batch(patch: pytest.MonkeyPatch) -> None:
    original = sampling.uniform
    patch.setattr(sampling, "uniform", lambda s, p: original(s, p + np.arange(len(p))))


@fault
def draw_repeats(patch: pytest.MonkeyPatch) -> None:
    original = sampling.uniform
    patch.setattr(sampling, "uniform", lambda s, p: original(s, p // 2))


@fault
def aborted_row_stays_in_the_batch(patch: pytest.MonkeyPatch) -> None:
    original = Scheduler._leave

    def leave(self: Scheduler, row: Row) -> None:
        original(self, row)
        if row.done:
            self._running.append(row)

    patch.setattr(Scheduler, "_leave", leave)


def test_the_traffic_passes_without_a_fault() -> None:
    traffic()


@pytest.mark.parametrize("name", list(FAULTS))
def test_a_fault_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    FAULTS[name](monkeypatch)
    with pytest.raises((Wrong, CacheCorrupted, EngineDied)):
        traffic()


@pytest.mark.parametrize("name", list(RECURRENT_FAULTS))
def test_a_fault_of_recurrent_groups_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    RECURRENT_FAULTS[name](monkeypatch)
    with pytest.raises((Wrong, CacheCorrupted, EngineDied)):
        traffic(RECURRENT_SHAPES)
