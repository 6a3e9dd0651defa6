"""Guards the order among groups in which the prefix tree gives things up: snapshots and windows'
pages go alone; of the leaves that keep everything, those that serve no prompt for want of another
group's part go before those that do, and among equals the policy decides."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.cached_prefixes import (
    FULL,
    SIZE,
    cache_of,
    computed,
    depth,
    remember,
    snapshot,
    tokens,
)
from support.engine_traffic import _nodes
from support.mock_executor import group, state

from sixfold.common.cache.kv_cache import KVCache
from sixfold.common.cache.prefix_tree import Node
from sixfold.platforms.interface_kv import I32, KVGroup

STATE = state("state", 12, SIZE)
WINDOW = group("window", 20, SIZE, window=6)
MODELS = {
    "states": (FULL, STATE),
    "window": (FULL, WINDOW),
    "all": (STATE, WINDOW, FULL, state("other", 10, SIZE)),
}


def text_of(node: Node) -> I32:
    keys: list[bytes] = []
    at: Node | None = node
    while at is not None and at.parent is not None:
        keys.append(at.key)
        at = at.parent
    return np.frombuffer(b"".join(reversed(keys)), np.int32)


def serves(cache: KVCache, node: Node) -> bool:
    """By what a match finds, not by the tree's own rule."""
    return depth(cache, text_of(node)) == node.depth


def test_what_was_answered_goes_before_the_prompt_whose_state_is_kept() -> None:
    """The older page serves; the younger ones behind it, of an answer, have no snapshot."""
    cache = cache_of(FULL, STATE)
    snapshot(cache, tokens(1))
    snapshot(cache, tokens(2))
    remember(cache, tokens(2, 3, 4))
    for left in (3, 2, 1):
        assert cache.tree.evict(0)
        assert len(_nodes(cache)) == left
    assert [depth(cache, tokens(n)) for n in (1, 2)] == [0, 1]  # then the policy's turn


def test_a_leaf_that_lost_its_snapshot_goes_first() -> None:
    cache = cache_of(FULL, STATE)
    snapshot(cache, tokens(1))
    snapshot(cache, tokens(2))
    row = computed(cache, tokens(1))  # the younger snapshot is that of 1
    cache.close(row)
    assert cache.tree.evict(1)  # of 2
    assert cache.tree.evict(0)
    assert (depth(cache, tokens(1)), len(_nodes(cache))) == (1, 1)


def test_leaves_go_first_when_a_page_of_their_window_has_gone() -> None:
    cache = cache_of(FULL, WINDOW)
    remember(cache, tokens(1, 2))
    remember(cache, tokens(3))
    remember(cache, tokens(3, 4))
    first = next(n for n in _nodes(cache) if n.key == tokens(1).tobytes())
    assert cache.tree.evict(1)
    assert not first.pages[1]  # the oldest of the windows' pages, above the leaf of 2
    remember(cache, tokens(5))
    for gone in (2, 1):
        leaves = [text_of(n).tolist() for n in _nodes(cache) if not n.children]
        assert tokens(*range(1, gone + 1)).tolist() in leaves
        assert cache.tree.evict(0)
    assert depth(cache, tokens(3, 4)) == 2


def test_a_snapshot_that_comes_back_saves_its_leaf() -> None:
    cache = cache_of(FULL, STATE)
    for page in (1, 2):
        snapshot(cache, tokens(page))
    while cache.tree.evict(1):
        pass
    snapshot(cache, tokens(1))
    assert cache.tree.evict(0)
    assert (depth(cache, tokens(1)), len(_nodes(cache))) == (1, 1)


def idle_first(cache: KVCache, full: int) -> Node | None:
    """The leaf that should go next, by sorting all of them."""
    leaves = [n for n in _nodes(cache) if not n.children and not n.rows]
    key = cache.tree._policy
    return min(
        leaves,
        key=lambda n: (serves(cache, n), key(n, full), n.depth, n.serial),
        default=None,
    )


@pytest.mark.parametrize("policy", ["lru", "lfu", "priority"])
@pytest.mark.parametrize("model", MODELS)
def test_the_order_agrees_with_a_full_scan(model: str, policy: str) -> None:
    """Over random prefixes, snapshots and losses in every group, with a row in between."""
    groups: tuple[KVGroup, ...] = MODELS[model]
    rng, cache = np.random.default_rng(3), cache_of(*groups, eviction=policy)
    full = groups.index(FULL)
    checked: list[tuple[bool, bool]] = []
    row: Any = None
    for _ in range(300):
        text = tokens(*rng.integers(0, 3, rng.integers(1, 4)))
        what = rng.random()
        if what < 0.5 and min(pool.available for pool in cache.pools) > 6:
            save = model != "window" and rng.random() < 0.5
            if save:
                snapshot(cache, text)
            else:
                remember(cache, text, int(rng.integers(3)))
        elif what < 0.7:
            cache.tree.evict(int(rng.integers(len(groups))))
        elif what < 0.75 and row is None and cache.room() > 6:
            row = computed(cache, text)
        elif what < 0.8 and row is not None:
            cache.close(row)
            row = None
        else:
            wanted = idle_first(cache, full)
            idle = sum(1 for n in _nodes(cache) if not n.children and not serves(cache, n))
            assert cache.tree.evict(full) == (wanted is not None)
            if wanted is not None:
                assert wanted not in _nodes(cache)
                checked.append((idle > 0, serves(cache, wanted)))
        for node in _nodes(cache):
            assert cache.tree.serves(node) == serves(cache, node)
        cache.check()
    assert {idle for idle, _ in checked} == {True, False}
    assert max(map(len, cache.tree._heaps)) <= 2 * FULL.pages + 1


def test_the_scan_notices_an_order_by_policy_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sixfold.common.cache.prefix_tree.PrefixTree.serves", lambda *_: True)
    cache = cache_of(FULL, STATE)
    snapshot(cache, tokens(1))
    remember(cache, tokens(2))
    wanted = idle_first(cache, 0)
    assert cache.tree.evict(0)
    assert wanted in _nodes(cache)
