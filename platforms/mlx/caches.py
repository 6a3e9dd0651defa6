"""What a layer of an mlx-lm model gets in place of mlx-lm's own cache: the same small protocol,
standing on the engine's pages and slots.

For one step each stand-in is bound to the step's plan. Attention asks it for `offset`, a mask, and
hands it the new keys and values; a recurrent mixer reads and writes its arrays by item.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..interface_kv import KVGroup
from .page_products import Blocks
from .pools import LayerPages, LayerStates
from .step_plan import PagePlan, StatePlan


@dataclass(frozen=True, slots=True)
class InPlace:
    """What a decode step reads where it lies: the arguments of the op `paged_attention`, and those
    of `page_products.py`."""

    keys: mx.array  # (heads * slots, dim), and values
    values: mx.array
    pages: mx.array  # (R, P)
    lengths: mx.array  # (R,) int32, tokens of each row on its pages
    heads: int
    page_size: int
    window: int
    blocks: Blocks


class PagedCache:
    """Stands in for KVCache and RotatingKVCache. Keys and values are stored in the pages and read
    back from them, never kept anywhere else."""

    def __init__(self, pages: LayerPages, window: int) -> None:
        self._pages = pages
        self._window = window
        self.plan: PagePlan | None = None
        # Weak: a cache that held them would keep what every layer of a step gathers.
        self._given: tuple[weakref.ref[mx.array], ...] = ()

    @property
    def offset(self) -> Any:
        """Where each row's new tokens begin: an int for one row, else (R,) int32."""
        return self._bound.offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """keys (R, H, S, D) and values of the new tokens -> those of all that the rows may see,
        (R, H, K, D); the plan's mask hides what is no token of theirs."""
        plan = self._bound
        self._pages.write(plan, keys, values)
        found = self._pages.read(plan)
        self._given = tuple(weakref.ref(array) for array in found)
        return found

    def in_place(self, keys: mx.array, values: mx.array, mask: Any) -> InPlace | None:
        """Where `keys` and `values` lie, for attention of one query a row. None unless they are the
        very arrays that were fetched last and `mask` is this step's: else they are the model's own
        and stand for something else."""
        plan, given = self._bound, tuple(ref() for ref in self._given)
        if len(given) != 2 or given[0] is not keys or given[1] is not values:
            return None
        window = plan.window_of(mask)
        if window is None:
            return None
        held, stored = self._pages.arrays
        heads, blocks = self._pages.heads, plan.blocks(window)
        return InPlace(
            held, stored, blocks.pages, plan.lengths(), heads, plan.page_size, window, blocks
        )

    def make_mask(
        self, tokens: int, return_array: bool = False, window_size: int | None = None
    ) -> Any:
        """None (all is seen), "causal", or (R, 1, S, K) bool."""
        window = window_size or self._window
        if window_size and self._window and window_size != self._window:
            window = min(window_size, self._window)
        return self._bound.mask(window, return_array)

    @property
    def _bound(self) -> PagePlan:
        if self.plan is None:
            raise RuntimeError("the layer's cache was used outside of a step")
        return self.plan


class StateCache:
    """Stands in for ArraysCache: what a recurrent mixer keeps between steps, row by row."""

    left_padding = None

    def __init__(self, states: LayerStates) -> None:
        self._states = states
        self.plan: StatePlan | None = None

    def __getitem__(self, index: int) -> mx.array:
        return self._states.read(self._bound, index)

    def __setitem__(self, index: int, value: mx.array) -> None:
        self._states.write(self._bound, index, value)

    @property
    def lengths(self) -> mx.array | None:
        """(R,) new tokens of each row, None when no row is padded."""
        return self._bound.lengths

    def make_mask(self, tokens: int) -> mx.array | None:
        return self._bound.mask

    def advance(self, tokens: int) -> None:
        """Nothing is to be done: the scheduler knows how far each row is."""

    def empty(self) -> bool:
        return False

    @property
    def _bound(self) -> StatePlan:
        if self.plan is None:
            raise RuntimeError("the layer's cache was used outside of a step")
        return self.plan


Cache = PagedCache | StateCache


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """A cache group as the runner uses it: the pools of its layers, and what stands in for their
    caches."""

    group: KVGroup
    pools: tuple[LayerPages | LayerStates, ...]
    caches: tuple[Cache, ...]


def bind(group: CacheGroup, plan: Any) -> None:
    """Give the stand-ins of a group the plan of a step: pages' or states', as its kind is."""
    for cache in group.caches:
        cache.plan = plan
