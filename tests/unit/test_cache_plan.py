"""Guards how executors size the cache: groups from needs, pages from a budget, windows
bounded, every limit honoured or refused with numbers."""

from __future__ import annotations

import pytest

from sixfold.common.decisions import DecisionLog
from sixfold.common.errors import CheckpointError, OutOfMemory
from sixfold.platforms.cache_plan import CachePlan, CachePlanner, group_needs
from sixfold.platforms.interface import EngineSpec
from sixfold.platforms.interface_kv import CacheNeed, KVKind

FULL = CacheNeed(KVKind.FULL, 2, 64)
WINDOW = CacheNeed(KVKind.WINDOW, 2, 64, window=512)
PAGE = 2 * 2 * 64 * 4 * 16  # bytes per layer: kv, heads, dim, float32, tokens


def plan(
    needs: list[CacheNeed], budget: int, context: int = 8192, **spec: object
) -> tuple[CachePlan, DecisionLog]:
    log = DecisionLog()
    engine = EngineSpec("", **spec)
    planner = CachePlanner(
        engine, group_needs(needs), "float32", context, (budget, "a test's budget"), log
    )
    return planner.plan(), log


def test_layers_with_equal_needs_form_one_group_in_order() -> None:
    other = CacheNeed(KVKind.WINDOW, 2, 64, window=128)
    groups = group_needs([WINDOW, WINDOW, FULL, WINDOW, other])
    assert [(g.name, g.sites) for g in groups] == [
        ("window-512-2x64", (0, 1, 3)),
        ("full", (2,)),
        ("window-128-2x64", (4,)),
    ]


def test_an_unsupported_kind_is_refused_with_its_layer() -> None:
    with pytest.raises(CheckpointError, match=r"site 1 .*latent"):
        group_needs([FULL, CacheNeed(KVKind.LATENT, 1, 576)], (KVKind.FULL,))


def test_a_large_budget_is_capped_by_rows_times_context() -> None:
    made, log = plan([FULL], 1 << 60, context=1000, max_rows=4)
    assert made.groups[0].pages == 4 * 63 + 1
    assert made.max_context == 1000
    (cache,) = [d for d in log if d.what == "cache"]
    assert "all 4 rows at 1000 tokens" in cache.because


@pytest.mark.parametrize("pages", [2, 3, 100, 511])
def test_the_most_pages_that_fit_are_taken(pages: int) -> None:
    made, _ = plan([FULL, FULL], 2 * PAGE * pages + 1, max_rows=4)
    assert made.groups[0].pages == pages
    assert made.bytes <= 2 * PAGE * pages + 1
    assert made.max_context == min(8192, (pages - 1) * 16)


def test_a_window_group_stops_growing_where_rows_need_no_more() -> None:
    budget = 40_000 * PAGE // 16
    made, _ = plan([FULL, WINDOW, WINDOW], budget, context=10**6, max_rows=2, max_step_tokens=64)
    full, window = made.groups
    assert window.pages == 2 * 2 * (32 + 2) + 4 + 1
    assert window.window == 512
    assert full.pages > window.pages
    assert made.bytes <= budget < made.bytes + full.bytes_per_page


def test_a_small_window_group_has_as_many_pages_as_the_full_one() -> None:
    made, _ = plan([FULL, WINDOW], 20 * PAGE)
    assert [g.pages for g in made.groups] == [10, 10]


def test_no_room_for_a_page_is_out_of_memory_with_numbers() -> None:
    with pytest.raises(OutOfMemory, match=r"0\.00 GiB.*a test's budget"):
        plan([FULL], PAGE)
    with pytest.raises(OutOfMemory, match=r"there is room for 0\.00 GiB"):
        plan([FULL], -5)
