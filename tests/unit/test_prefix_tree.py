"""Guards the prefix tree and KVCache: how deep a prompt matches with full and window groups, what
is given up first, what rows share, and which groups are refused."""

from __future__ import annotations

from dataclasses import replace

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
from sixfold.common.errors import CacheCorrupted, ConfigError
from sixfold.platforms.interface_kv import KVGroup, KVKind

# ---- matching


def test_a_prefix_matches_page_by_page() -> None:
    cache = cache_of()
    remember(cache, tokens(1, 2, 3))
    assert depth(cache, tokens(1, 2, 3)) == 3
    assert depth(cache, tokens(1, 2, 7)) == 2
    assert depth(cache, tokens(2, 2, 3)) == 0
    assert depth(cache, tokens(1, 2)[:6]) == 1


def test_the_last_token_is_always_left_to_compute() -> None:
    cache = cache_of()
    remember(cache, tokens(1, 2, 3))
    assert len(cache.match(cache.tree.root, tokens(1, 2, 3)).nodes) == 2


def test_without_prefix_cache_nothing_is_kept_or_matched() -> None:
    cache = cache_of(prefix_cache=False)
    remember(cache, tokens(1, 2, 3))
    assert depth(cache, tokens(1, 2, 3)) == 0
    assert cache.pools[0].free == 20


def test_a_match_shares_pages_and_pins_them() -> None:
    cache = cache_of()
    first = computed(cache, tokens(1, 2, 3))
    second = computed(cache, tokens(1, 2, 4))
    table = cache.tables[0]
    assert table[first.handle, :2].tolist() == table[second.handle, :2].tolist()
    assert table[first.handle, 2] != table[second.handle, 2]
    assert cache.pools[0].pinned == 4
    cache.close(first)
    assert (cache.pools[0].pinned, cache.pools[0].evictable) == (3, 1)
    cache.close(second)
    assert (cache.pools[0].pinned, cache.pools[0].evictable) == (0, 4)


def test_rows_that_computed_the_same_end_up_on_the_same_pages() -> None:
    cache = cache_of()
    rows = [cache.open(), cache.open()]
    for row in rows:
        assert cache.grow(row, 2)
    for row in rows:
        cache.publish(row, tokens(1, 2), 0)
    assert cache.tables[0][0].tolist() == cache.tables[0][1].tolist()
    assert cache.pools[0].pinned == 2


def test_a_page_still_to_be_written_is_not_exchanged() -> None:
    cache = cache_of()
    rows = [cache.open(), cache.open()]
    for row in rows:
        assert cache.grow(row, 1)
        cache.publish(row, tokens(1), 0, may_swap=False)
    assert cache.tables[0][0, 0] != cache.tables[0][1, 0]


def test_a_window_group_serves_only_where_its_last_tokens_are() -> None:
    cache = cache_of(FULL, group("window", 20, SIZE, window=6))
    remember(cache, tokens(1, 2, 3, 4, 5))
    assert depth(cache, tokens(1, 2, 3, 4, 5)) == 5
    window = next(n for n in _nodes(cache) if n.depth == 4)
    cache.pools[1].drop(window.pages[1])
    window.pages[1] = 0
    # Boundaries after 4 and 5 pages need the page that is gone: 5 tokens before the boundary.
    assert depth(cache, tokens(1, 2, 3, 4, 5)) == 3
    assert depth(cache, tokens(1, 2, 3)) == 3


@pytest.mark.parametrize("window", [1, 2, 4, 5, 6, 8, 9, 13])
def test_a_match_is_the_deepest_boundary_whose_window_is_there(window: int) -> None:
    """Against the definition, for every pattern of missing window pages."""
    text = tokens(1, 2, 3, 4, 5)
    for missing in range(32):
        cache = cache_of(FULL, group("window", 20, SIZE, window=window))
        remember(cache, text)
        for node in _nodes(cache):
            if missing >> (node.depth - 1) & 1:
                cache.pools[1].drop(node.pages[1])
                node.pages[1] = 0
        want = 0
        for pages in range(1, 6):
            seen = range(max(0, pages * SIZE - window + 1), pages * SIZE)
            if not any(missing >> (position // SIZE) & 1 for position in seen):
                want = pages
        assert depth(cache, text) == want


def test_a_row_takes_only_the_window_pages_it_reads() -> None:
    cache = cache_of(FULL, group("window", 20, SIZE, window=6))
    remember(cache, tokens(1, 2, 3, 4, 5))
    row = cache.open()
    cache.adopt(row, cache.match(row.node, tokens(1, 2, 3, 4, 5, 6)).nodes, 0)
    assert np.count_nonzero(cache.tables[0][row.handle]) == 5
    assert cache.tables[1][row.handle, :6].astype(bool).tolist() == [0, 0, 0, 1, 1, 0]
    assert cache.pools[1].pinned == 2


def test_a_page_that_a_row_has_begun_is_given_back_for_a_whole_one() -> None:
    cache = cache_of(FULL, group("window", 20, SIZE, window=6))
    remember(cache, tokens(1, 2, 3))
    row = cache.open()
    assert cache.grow(row, 1)  # begun before the other row had it
    cache.adopt(row, cache.match(row.node, tokens(1, 2, 3, 4)).nodes, 0)
    assert (row.pages, row.node.depth) == (3, 3)
    assert [pool.pinned for pool in cache.pools] == [3, 2]
    cache.close(row)
    assert [pool.available for pool in cache.pools] == [20, 20]


def test_a_row_gives_a_node_the_window_page_it_lacks() -> None:
    cache = cache_of(FULL, group("window", 20, SIZE, window=6))
    remember(cache, tokens(1, 2))
    for _ in range(2):
        assert cache.tree.evict(1)
    assert depth(cache, tokens(1, 2)) == 0
    row = cache.open()
    assert cache.grow(row, 2)
    cache.publish(row, tokens(1, 2), 0)
    assert depth(cache, tokens(1, 2)) == 2
    assert cache.pools[0].total - cache.pools[0].free == 2  # the full pages are shared


def test_window_pages_are_released_as_a_row_moves_on() -> None:
    cache = cache_of(group("window", 20, SIZE, window=6))
    row = cache.open()
    assert cache.grow(row, 5)
    cache.slide(row, 8)  # position 8 sees 3 to 8
    assert cache.tables[0][row.handle, :5].astype(bool).tolist() == [1, 1, 1, 1, 1]
    cache.slide(row, 9)  # position 9 sees 4 to 9
    assert cache.tables[0][row.handle, :5].astype(bool).tolist() == [0, 1, 1, 1, 1]
    assert cache.pools[0].pinned == 4


STATES = state("state", 10, SIZE)


@pytest.mark.parametrize("groups", [(STATES,), (FULL, STATES), (STATES, FULL), (STATES, STATES)])
def test_a_recurrent_group_serves_only_where_a_snapshot_is(groups: tuple[KVGroup, ...]) -> None:
    cache = cache_of(*groups)
    snapshot(cache, tokens(1, 2))
    snapshot(cache, tokens(1, 2, 3, 4))
    found = [cache.match(cache.tree.root, tokens(*range(1, n + 2))) for n in range(6)]
    assert [len(match.nodes) for match in found] == [0, 0, 2, 2, 4, 4]
    assert [match.reach for match in found] == [0, 1, 2, 3, 4, 4]


def test_every_recurrent_group_needs_its_snapshot() -> None:
    cache = cache_of(FULL, STATES, replace(STATES, name="other"))
    snapshot(cache, tokens(1, 2))
    assert depth(cache, tokens(1, 2)) == 2
    assert cache.tree.evict(2)
    assert depth(cache, tokens(1, 2)) == 0
    snapshot(cache, tokens(1, 2))  # the group that has one keeps it
    assert depth(cache, tokens(1, 2)) == 2
    assert [pool.evictable for pool in cache.pools] == [2, 1, 1]


def test_a_match_needs_the_snapshot_and_the_window() -> None:
    cache = cache_of(FULL, group("window", 20, SIZE, window=6), STATES)
    for text in (tokens(1, 2), tokens(1, 2, 3, 4, 5)):
        snapshot(cache, text)
    assert depth(cache, tokens(1, 2, 3, 4, 5)) == 5
    last = next(n for n in _nodes(cache) if n.depth == 5)
    cache.pools[1].drop(last.pages[1])
    last.pages[1] = 0
    assert depth(cache, tokens(1, 2, 3, 4, 5)) == 2


def test_a_row_goes_on_from_a_snapshot_by_a_copy_and_pins_nothing_of_it() -> None:
    cache = cache_of(FULL, STATES)
    snapshot(cache, tokens(1, 2))
    row = computed(cache, tokens(1, 2, 3))
    (restore,) = cache.states.take_moves()
    node = next(n for n in _nodes(cache) if n.depth == 2)
    assert (restore.source, restore.target) == (node.pages[1], cache.tables[1][row.handle, 0])
    assert (cache.pools[1].pinned, cache.pools[1].evictable) == (1, 1)
    assert cache.tree.evict(1)
    assert not cache.tree.evict(1)  # never the slot of a row
    assert (cache.pools[1].pinned, cache.pools[1].free) == (1, 9)


def test_only_a_prompt_for_which_there_is_a_slot_is_cut() -> None:
    cache = cache_of(FULL, state("state", 8, SIZE))
    assert [cache.next_snapshot(10, c, 0) for c in (0, 7, 8)] == [8, 8, 0]
    assert [cache.next_snapshot(10, c, 1) for c in (0, 3, 4)] == [4, 4, 8]
    assert [cache.next_snapshot(n, 0, 0) for n in (1, 4, 5, 8, 9)] == [0, 0, 4, 4, 8]
    rows = [cache.open() for _ in range(8)]
    assert not cache.states.has_room
    assert cache.next_snapshot(10, 0, 0) == 0
    cache.close(rows[0])
    assert cache.next_snapshot(10, 0, 0) == 8
    assert cache_of(FULL, STATES, prefix_cache=False).next_snapshot(10, 0, 0) == 0


# ---- giving up


def test_lru_gives_up_what_was_used_longest_ago() -> None:
    cache = cache_of()
    for page in (1, 2, 3):
        remember(cache, tokens(page))
    remember(cache, tokens(1, 4))  # uses 1 again
    assert cache.tree.evict(0)
    assert [depth(cache, tokens(page)) for page in (1, 2, 3)] == [1, 0, 1]
    assert cache.tree.evict(0)
    assert [depth(cache, tokens(page)) for page in (1, 2, 3)] == [1, 0, 0]


def test_lfu_gives_up_what_was_matched_least() -> None:
    cache = cache_of(eviction="lfu")
    for page in (1, 2, 3, 1, 1, 3):
        remember(cache, tokens(page))
    for gone in (2, 3, 1):
        assert depth(cache, tokens(gone)) == 1
        assert cache.tree.evict(0)
        assert depth(cache, tokens(gone)) == 0


def test_priority_gives_up_the_least_important() -> None:
    cache = cache_of(eviction="priority")
    for page, priority in ((1, 5), (2, 0), (3, 5), (2, 9)):
        remember(cache, tokens(page), priority)
    for gone in (1, 3, 2):
        assert cache.tree.evict(0)
        assert depth(cache, tokens(gone)) == 0


def test_a_full_group_gives_up_leaves_only_and_a_node_in_all_groups() -> None:
    cache = cache_of(FULL, group("window", 20, SIZE, window=6))
    remember(cache, tokens(1, 2, 3))
    assert cache.tree.evict(0)
    assert depth(cache, tokens(1, 2, 3)) == 2
    assert (cache.pools[0].free, cache.pools[1].free) == (18, 18)


def test_a_window_group_gives_up_any_page_without_the_node() -> None:
    cache = cache_of(FULL, group("window", 20, SIZE, window=6))
    remember(cache, tokens(1, 2, 3))
    assert cache.tree.evict(1)
    assert (cache.pools[0].free, cache.pools[1].free) == (17, 18)
    assert depth(cache, tokens(1, 2, 3)) == 3  # it was the first page, out of every window


def test_what_a_row_uses_is_never_given_up() -> None:
    cache = cache_of()
    row = computed(cache, tokens(1, 2, 3))
    assert not cache.tree.evict(0)
    cache.close(row)
    assert cache.tree.evict(0)


def test_growing_evicts_and_fails_without_a_trace_when_it_cannot() -> None:
    cache = cache_of(group("full", 5, SIZE), group("window", 3, SIZE, window=6))
    remember(cache, tokens(1, 2, 3))
    row = cache.open()
    assert not cache.grow(row, 4)
    assert depth(cache, tokens(1, 2, 3)) == 3
    assert cache.grow(row, 3)
    assert row.pages == 3


def test_nodes_without_pages_go_in_a_model_of_windows_only() -> None:
    cache = cache_of(group("window", 20, SIZE, window=6))
    remember(cache, tokens(1, 2, 3))
    for left in (3, 3, 0):  # the chain stays while its last page does
        assert len(_nodes(cache)) == 3
        assert cache.tree.evict(0)
        assert len(_nodes(cache)) == left
    assert cache.pools[0].free == 20


def test_the_eviction_heaps_stay_small() -> None:
    cache = cache_of(group("full", 6, SIZE), group("window", 6, SIZE, window=6))
    for page in range(500):
        remember(cache, tokens(page, page + 1))
    assert max(map(len, cache.tree._heaps)) <= 2 * 7 + 1


def test_a_snapshot_is_given_up_without_its_page_and_goes_with_it() -> None:
    cache = cache_of(FULL, STATES)
    snapshot(cache, tokens(1, 2))
    assert cache.tree.evict(1)
    assert [pool.evictable for pool in cache.pools] == [2, 0]
    snapshot(cache, tokens(1, 2))
    assert cache.tree.evict(0)
    assert [pool.evictable for pool in cache.pools] == [1, 0]


def test_nodes_without_snapshots_go_in_a_model_of_states_only() -> None:
    cache = cache_of(STATES)
    snapshot(cache, tokens(1, 2))
    snapshot(cache, tokens(1, 2, 3, 4))
    for left in (4, 0):  # that after two pages is the older one
        assert cache.tree.evict(0)
        assert len(_nodes(cache)) == left
    row = computed(cache, tokens(1, 2))
    assert len(_nodes(cache)) == 2  # where other prompts may branch from it while it runs
    cache.close(row)
    assert not _nodes(cache)


def test_a_slot_taken_when_there_is_none_is_an_error() -> None:
    cache = cache_of(FULL, state("state", 8, SIZE))
    row = [cache.open() for _ in range(8)][-1]
    with pytest.raises(CacheCorrupted, match="'state': no slot"):
        cache.states.promise(row, tokens(1))


@pytest.mark.parametrize("eviction", ["lru", "lfu", "priority"])
def test_eviction_order_agrees_with_a_full_scan(eviction: str) -> None:
    """The lazy heap against sorting all evictable nodes by the same key."""
    rng, cache = np.random.default_rng(1), cache_of(eviction=eviction)
    for _ in range(400):
        text = tokens(*rng.integers(0, 3, rng.integers(1, 4)))
        if cache.pools[0].free >= 3 and rng.random() < 0.6:
            remember(cache, text, int(rng.integers(3)))
            continue
        leaves = [n for n in _nodes(cache) if not n.children]
        if leaves:
            first = min(leaves, key=lambda n: (cache.tree._policy(n, 0), n.depth, n.serial))
            assert cache.tree.evict(0)
            assert first not in _nodes(cache)


# ---- guards


@pytest.mark.parametrize("kind", [KVKind.LATENT, KVKind.COMPRESSED])
def test_groups_that_keep_every_page_are_served_alike(kind: KVKind) -> None:
    """Beside a full group and alone: the same pages are held, matched and given up."""
    for groups in ((FULL,), (FULL, replace(FULL, name="other"))):
        same = [cache_of(*groups), cache_of(*(replace(g, kind=kind) for g in groups))]
        for cache in same:
            for i in range(30):
                remember(cache, tokens(i % 3, i % 5, i % 7), i % 3)
        plain, other = ([[*node.pages, node.depth] for node in _nodes(cache)] for cache in same)
        assert plain == other
        assert [p.free for p in same[0].pools] == [p.free for p in same[1].pools]


@pytest.mark.parametrize(
    "groups",
    [
        (FULL, group("other", 20, 8)),
        (group("empty", 0, SIZE),),
        (replace(FULL, kind=KVKind.WINDOW),),
        (FULL, state("state", 7, SIZE)),
    ],
)
def test_impossible_groups_are_refused(groups: tuple[KVGroup, ...]) -> None:
    with pytest.raises(ConfigError, match="Cache group"):
        cache_of(*groups)
    with pytest.raises(ConfigError, match="no cache group"):
        KVCache((), 8, 80)


def test_capacity_is_the_longest_sequence_that_fits() -> None:
    assert KVCache((group("full", 5, SIZE),), 1, 1000).capacity == 20
    assert KVCache((group("full", 5, SIZE),), 1, 13).capacity == 16
    windowed = (group("full", 50, SIZE), group("window", 3, SIZE, window=6))
    assert KVCache(windowed, 1, 1000).capacity == 200
    tight = (group("full", 50, SIZE), group("window", 2, SIZE, window=6))
    assert KVCache(tight, 1, 1000).capacity == 8
