"""Decode steps as compiled functions, one for each bucket of rows and pages.

What a step changes goes in and comes out: its tokens, where each row stands, and the pools' arrays.
So `mx.compile` may trace the model's Python once for the shapes of a bucket and fuse what lies
between its products; a later step of that bucket costs one call in place of the whole model's
Python. Rows are padded to a power of two and so are the pages that they read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ..interface_kv import KVGroup, KVKind
from ..interface_step import StepBatch
from ..sampling_rows import no_sampling
from .caches import CacheGroup, bind
from .page_products import Blocks, hiding
from .pools import LayerStates
from .step_plan import Rows, StatePlan, plan_pages, plan_states, seen_by
from .trunk import SplitModel

FEWEST_PAGES = 4


def bucket(count: int, fewest: int = 1) -> int:
    """The smallest power of two that is not below either."""
    return max(fewest, 1 << (count - 1).bit_length())


class TracedPages:
    """What PagePlan is, of arrays that a compiled function takes: their numbers are not known."""

    run = length = None

    def __init__(self, page_size: int, arrays: Sequence[mx.array]) -> None:
        self.page_size = page_size
        self.offset, self._base, self.slots, self.begun, self.pages = arrays
        self._made: dict[Any, Any] = {}

    def mask(self, window: int, as_array: bool) -> mx.array:
        if window not in self._made:
            keys = self.pages.shape[1] * self.page_size
            self._made[window] = seen_by(self.offset[:, None], self._base, keys, window)
        return self._made[window]

    def window_of(self, mask: Any) -> int | None:
        windows = (key for key, made in self._made.items() if made is mask)
        return next((window for window in windows if isinstance(window, int)), None)

    def lengths(self) -> mx.array:
        return self.offset + 1 - self._base

    def blocks(self, window: int) -> Blocks:
        key = ("blocks", window)
        if key not in self._made:
            hidden = hiding(self.lengths(), self.pages.shape[1] * self.page_size, window)
            self._made[key] = Blocks(self.pages, hidden, 0, self.page_size)
        return self._made[key]

    def index(self, name: str, heads: int, stride: int) -> mx.array:
        key = (name, heads, stride)
        if key not in self._made:
            first = mx.arange(heads, dtype=mx.uint32)[:, None] * stride
            self._made[key] = (first + getattr(self, name).reshape(1, -1)).reshape(-1)
        return self._made[key]


class CompiledSteps:
    """`run` in place of the trunk, for rows that decode. `traces` counts the buckets met so far."""

    def __init__(
        self, model: SplitModel, groups: Sequence[CacheGroup], caches: Sequence[Any]
    ) -> None:
        self._model = model
        self._groups = tuple(groups)
        self._caches = list(caches)
        self._pools = [pool for group in self._groups for pool in group.pools]
        self._compiled = mx.compile(self._trace)
        self.traces = 0

    def serves(self, rows: Rows) -> bool:
        return rows.width == 1 and int(rows.context.min()) > 0

    def run(self, rows: Rows, tokens: mx.array) -> mx.array:
        """tokens (R, 1) -> hidden (R', 1, width) with R' >= R: padding is behind the rows."""
        size = bucket(len(tokens))
        plans = [self._inputs(group.group, rows, size) for group in self._groups]
        for pool in self._pools:
            if isinstance(pool, LayerStates):
                pool.settle()
        before = [pool.arrays for pool in self._pools]
        padded = mx.pad(tokens, [(0, size - len(tokens)), (0, 0)])
        try:
            hidden, after = self._compiled(padded, plans, before)
        except BaseException:
            self._put(before)  # tracing leaves arrays without values
            raise
        self._put(after)
        return hidden

    def difference(self) -> float:
        """How far a toy step is from the same step op by op, as a share of the largest output. For
        pools of a few pages (`TOY_PAGES`), which keep what they hold."""
        rows, tokens = _toy(self._groups), mx.array([[1], [2], [3]], mx.int32)
        before = [pool.arrays for pool in self._pools]
        compiled = self.run(rows, tokens)[: len(tokens)]
        mx.eval(compiled)
        self._put(before)
        for group in self._groups:
            recurrent = group.group.kind is KVKind.RECURRENT
            bind(group, (plan_states if recurrent else plan_pages)(rows, group.group))
        plain = self._model.trunk(tokens, self._caches)
        mx.eval(plain)
        self._put(before)
        apart, largest = (mx.abs(x.astype(mx.float32)).max() for x in (compiled - plain, plain))
        return float(apart) / max(float(largest), 1e-30)

    def _put(self, arrays: Sequence[Sequence[mx.array]]) -> None:
        for pool, some in zip(self._pools, arrays, strict=True):
            pool.arrays = list(some)

    def _trace(self, tokens: mx.array, plans: Any, pools: Any) -> Any:
        self.traces += 1
        self._put(pools)
        for group, arrays in zip(self._groups, plans, strict=True):
            if group.group.kind is KVKind.RECURRENT:
                bind(group, StatePlan(arrays[0], None, False, None, None))
            else:
                bind(group, TracedPages(group.group.page_size, arrays))
        hidden = self._model.trunk(tokens, self._caches)
        return hidden, [pool.arrays for pool in self._pools]

    def _inputs(self, group: KVGroup, rows: Rows, size: int) -> list[mx.array]:
        """Padding stands on the null page and in the null slot."""
        if group.kind is KVKind.RECURRENT:
            slots = rows.batch.state_slots[group.name][rows.first : rows.last]
            return [_padded(slots, size, mx.uint32)]
        plan = plan_pages(rows, group)
        wide = bucket(plan.pages.shape[1], FEWEST_PAGES)
        more = np.repeat(plan.pages[:, :1], wide - plan.pages.shape[1], axis=1)
        pages = np.concatenate((plan.pages, more), axis=1)
        places = ((rows.context, mx.int32), (plan.base, mx.int32), (plan.slots, mx.uint32))
        arrays = [_padded(values, size, dtype) for values, dtype in places]
        return [*arrays, _padded(plan.begun, size, mx.uint32), _padded(pages, size, mx.uint32)]


TOY_PAGES = 16
_CONTEXTS = (1, 2, 3)


def _toy(groups: Sequence[CacheGroup]) -> Rows:
    """Three rows that decode, on pages of their own from 1 on."""
    count = len(_CONTEXTS)
    tables, slots = {}, {}
    for group in (group.group for group in groups):
        if group.kind is KVKind.RECURRENT:
            slots[group.name] = np.arange(1, count + 1, dtype=np.int32)
            continue
        wide = -(-(max(_CONTEXTS) + 1) // group.page_size)
        tables[group.name] = 1 + np.arange(count * wide, dtype=np.int32).reshape(count, wide)
    batch = StepBatch(
        step=0,
        row_ids=np.arange(count, dtype=np.int32),
        token_ids=np.array([1, 2, 3], np.int32),
        query_start=np.arange(count + 1, dtype=np.int32),
        context_lens=np.array(_CONTEXTS, np.int32),
        page_tables=tables,
        want=np.zeros(count, np.uint8),
        sampling=no_sampling(count),
        state_slots=slots,
    )
    return Rows(batch, 0, count)


def _padded(values: np.ndarray, size: int, dtype: mx.Dtype) -> mx.array:
    """Zeros behind, along the first axis."""
    whole = np.zeros((size, *values.shape[1:]), np.int32)
    whole[: len(values)] = values
    return mx.array(whole, dtype=dtype)
