"""Guards PagePool: reference counts, the three kinds of pages and their sum, and a typed error for
every misuse."""

from __future__ import annotations

import numpy as np
import pytest
from support.mock_executor import group

from sixfold.common.cache.pages import PagePool
from sixfold.common.errors import CacheCorrupted


def pool(pages: int = 4) -> PagePool[str]:
    return PagePool(group("full", pages, 16))


def kinds(p: PagePool[str]) -> tuple[int, int, int]:
    p.check()
    return p.free, p.evictable, p.pinned


def test_the_null_page_is_never_handed_out() -> None:
    p = pool()
    assert sorted(p.take(4)) == [1, 2, 3, 4]
    assert p.total == 4
    assert kinds(p) == (0, 0, 4)


def test_a_page_without_holder_is_free_again_when_its_last_row_goes() -> None:
    p = pool()
    (page,) = p.take(1)
    p.retain(page)
    p.release(page)
    assert kinds(p) == (3, 0, 1)
    p.release(page)
    assert kinds(p) == (4, 0, 0)


def test_a_kept_page_becomes_evictable_and_can_be_used_again() -> None:
    p = pool()
    (page,) = p.take(1)
    p.keep(page, "node")
    assert p.holder(page) == "node"
    p.release(page)
    assert kinds(p) == (3, 1, 0)
    assert p.available == 4
    p.retain(page)
    assert kinds(p) == (3, 0, 1)
    p.drop(page)
    assert kinds(p) == (3, 0, 1)
    p.release(page)
    assert kinds(p) == (4, 0, 0)


def test_dropping_an_unused_page_frees_it() -> None:
    p = pool()
    (page,) = p.take(1)
    p.keep(page, "node")
    p.release(page)
    p.drop(page)
    assert kinds(p) == (4, 0, 0)


def test_every_misuse_is_an_error_that_names_the_group() -> None:
    p = pool()
    with pytest.raises(CacheCorrupted, match=r"'full'.*5 pages were taken with 4 free"):
        p.take(5)
    for misuse in (p.release, p.retain, p.drop, lambda page: p.keep(page, "node")):
        with pytest.raises(CacheCorrupted):
            misuse(2)
    (page,) = p.take(1)
    p.keep(page, "a")
    with pytest.raises(CacheCorrupted):
        p.keep(page, "b")


def test_the_sum_is_checked() -> None:
    p = pool()
    p._free.pop()
    with pytest.raises(CacheCorrupted, match="3 free \\+ 0 evictable \\+ 0 pinned pages are not 4"):
        p.check()


def test_a_page_on_the_free_list_while_in_use_is_noticed() -> None:
    p = pool()
    (page,) = p.take(1)
    p._free.append(page)
    with pytest.raises(CacheCorrupted, match="free list"):
        p.take(1)


@pytest.mark.parametrize("seed", range(5))
def test_random_use_agrees_with_a_plain_recount(seed: int) -> None:
    rng, p = np.random.default_rng(seed), pool(12)
    rows: dict[int, int] = {}
    held: set[int] = set()
    for _ in range(2000):
        action, used = rng.integers(5), [page for page in rows if rows[page]]
        if action == 0 and p.free:
            (page,) = p.take(1)
            assert not rows.get(page)
            assert page not in held
            rows[page] = 1
        elif action == 1 and (used or held):
            page = int(rng.choice(used + list(held)))
            p.retain(page)
            rows[page] = rows.get(page, 0) + 1
        elif action == 2 and used:
            page = int(rng.choice(used))
            p.release(page)
            rows[page] -= 1
        elif action == 3 and set(used) - held:
            page = int(rng.choice(sorted(set(used) - held)))
            p.keep(page, "node")
            held.add(page)
        elif action == 4 and held:
            page = int(rng.choice(sorted(held)))
            p.drop(page)
            held.remove(page)
        pinned = sum(1 for count in rows.values() if count)
        evictable = sum(1 for page in held if not rows.get(page))
        assert kinds(p) == (12 - pinned - evictable, evictable, pinned)
