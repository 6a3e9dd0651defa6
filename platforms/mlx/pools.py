"""Pages of keys and values, and slots of recurrent state, as MLX arrays that are written in place.

MLX arrays are values: a write makes a new array, and MLX reuses the buffer when nobody else holds
it. So a pool is the only holder of its arrays, and the runner lets a step end on the device before
the next one's writes are started; otherwise every write would copy the pool.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import mlx.core as mx
import numpy as np

from ..interface_kv import KVGroup, KVLayout, StateArray
from .page_kernels import page_gather
from .step_plan import PagePlan, StatePlan


class LayerPages:
    """Keys and values of one layer, each (heads * pages * page_size, dim), head by head: whole
    pages of a head are one block, and one token of a head is one row."""

    def __init__(
        self,
        group: KVGroup,
        heads: int,
        key_dim: int,
        value_dim: int,
        dtype: mx.Dtype,
        gather: Callable[..., tuple[mx.array, mx.array]] = page_gather,
    ) -> None:
        self.heads = heads
        self._gather = gather
        self.dims = (key_dim, value_dim)
        self._pages, self._size = group.pages, group.page_size
        self._tokens = group.pages * group.page_size
        self.arrays = [mx.zeros((heads * self._tokens, dim), dtype) for dim in self.dims]

    @property
    def stored(self) -> list[mx.array]:
        return self.arrays

    def write(self, plan: PagePlan, keys: mx.array, values: mx.array) -> None:
        """keys, values (R, H, S, dim) at the plan's slots."""
        where = plan.index("slots", self.heads, self._tokens)
        if len(plan.begun):
            self._clear(plan)
        for i, new in enumerate((keys, values)):
            rows = new.swapaxes(0, 1).reshape(-1, self.dims[i])
            self.arrays[i][where] = rows.astype(self.arrays[i].dtype)

    def _clear(self, plan: PagePlan) -> None:
        """Attention hides what is behind a row's last token by a sum and gives it the weight 0; a
        NaN left there by whoever had the page before would survive both."""
        where = plan.index("begun", self.heads, self._pages)
        for i, dim in enumerate(self.dims):
            blocks = self._blocks(i)
            blocks[where] = mx.zeros((len(where), blocks.shape[1]), blocks.dtype)
            self.arrays[i] = blocks.reshape(-1, dim)

    def read(self, plan: PagePlan) -> tuple[mx.array, mx.array]:
        """(R, H, K, dim) of keys and of values."""
        if plan.run is not None:  # no copy
            start, stop = plan.run
            keys, values = (
                self.arrays[i].reshape(1, self.heads, self._tokens, dim)[:, :, start:stop]
                for i, dim in enumerate(self.dims)
            )
            return keys, values
        pages = plan.index("pages", 1, 0).reshape(plan.pages.shape)
        keys, values = self._gather(*self.arrays, pages, self.heads, self._size)
        if plan.length is None:
            return keys, values
        return keys[:, :, : plan.length], values[:, :, : plan.length]

    def _blocks(self, i: int) -> mx.array:
        return self.arrays[i].reshape(self.heads * self._pages, self._size * self.dims[i])

    def page(self, page: int) -> list[mx.array]:
        """Keys and values of one page, each (heads, page_size, dim)."""
        return [
            self.arrays[i].reshape(self.heads, self._pages, self._size, dim)[:, page]
            for i, dim in enumerate(self.dims)
        ]

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        heads = np.arange(self.heads)[:, None] * self._pages
        source, target = (
            mx.array((heads + np.asarray(pages)[None]).reshape(-1).astype(np.uint32))
            for pages in (sources, targets)
        )
        for i, dim in enumerate(self.dims):
            blocks = self._blocks(i)
            moved = mx.take(blocks, source, axis=0)
            blocks[target] = moved
            self.arrays[i] = blocks.reshape(-1, dim)


class LayerStates:
    """What one recurrent layer keeps for each slot: arrays (slots, *shape), and beside them what
    the rows of the last step left.

    A step reads its rows' states and writes them. Were both of the pool, the read could still hold
    it at the write, and MLX would copy it whole. So a step's states are kept as they are, the next
    step of the same rows goes on from them, and when others come they are put into the pool
    (`settle`) before anything is read.
    """

    def __init__(self, group: KVGroup, states: Sequence[StateArray]) -> None:
        self.arrays = [
            mx.zeros((group.pages, *state.shape), getattr(mx, state.dtype)) for state in states
        ]
        self._kept: dict[tuple[int, ...], dict[int, mx.array]] = {}

    @property
    def stored(self) -> list[mx.array]:
        return [*self.arrays, *(rows for kept in self._kept.values() for rows in kept.values())]

    def settle(self, staying: Collection[tuple[int, ...]] = ()) -> None:
        """Put what is kept into the pool, but for rows that go on: `staying` are the slots of each
        piece of the step to come."""
        for slots in [slots for slots in self._kept if slots not in staying]:
            where = mx.array(slots, mx.uint32)
            for index, rows in self._kept.pop(slots).items():
                self.arrays[index][where] = rows

    def read(self, plan: StatePlan, index: int) -> mx.array:
        """(R, *shape); zero for rows that begin."""
        pool = self.arrays[index]
        if plan.all_fresh:
            return mx.zeros((len(plan.slots), *pool.shape[1:]), pool.dtype)
        found = self._kept.get(plan.key, {}).get(index)
        if found is None:
            found = mx.take(pool, plan.slots, axis=0)
        if plan.fresh is None:
            return found
        fresh = plan.fresh.reshape(-1, *[1] * (found.ndim - 1))
        return mx.where(fresh, mx.zeros_like(found), found)

    def write(self, plan: StatePlan, index: int, value: mx.array) -> None:
        rows = value.astype(self.arrays[index].dtype)
        if plan.key:
            self._kept.setdefault(plan.key, {})[index] = rows
        else:
            self.arrays[index][plan.slots] = rows

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """What is copied is computed first, after the step before has ended: both would hold the
        pool when the target is written."""
        self.settle()
        mx.synchronize()
        source, target = (mx.array(list(slots), mx.uint32) for slots in (sources, targets))
        moved = [mx.take(pool, source, axis=0) for pool in self.arrays]
        mx.eval(moved)
        for pool, rows in zip(self.arrays, moved, strict=True):
            pool[target] = rows


class MLXPages:
    """KVPool of a group of attention layers. The canonical form of a page has keys and values side
    by side, so it exists where both have one size."""

    def __init__(self, group: KVGroup, layers: Sequence[LayerPages], dtype: str) -> None:
        self._group = group
        self._layers = tuple(layers)
        self._dtype = dtype

    @property
    def group(self) -> KVGroup:
        return self._group

    @property
    def layout(self) -> KVLayout:
        first = self._layers[0]
        shape = (len(self._layers), 2, first.heads, self._group.pages, self._group.page_size)
        axes = ("layer", "kv", "head", "page", "token", "dim")
        return KVLayout(axes, (*shape, first.dims[0]), self._dtype)

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        for layer in self._layers:
            layer.copy(sources, targets)

    def export_page(self, page: int) -> bytes:
        """Axes (layer, 2, token, head, dim), little-endian, the pool's dtype."""
        parts = [half for layer in self._layers for half in layer.page(page)]
        return b"".join(_bytes(part.swapaxes(0, 1)) for part in parts)

    def import_page(self, page: int, data: bytes) -> None:
        parts = [half for layer in self._layers for half in layer.page(page)]
        need = sum(part.nbytes for part in parts)
        if len(data) != need:
            raise ValueError(
                f"A page of group {self._group.name!r} has {need} bytes, got {len(data)}."
            )
        at = 0
        for layer in self._layers:
            for i, old in enumerate(layer.page(page)):
                heads, size, dim = old.shape
                raw = np.frombuffer(data[at : at + old.nbytes], np.uint8)
                new = mx.array(raw).view(old.dtype).reshape(size, heads, dim).swapaxes(0, 1)
                where = np.arange(heads) * self._group.pages + page
                blocks = layer.arrays[i].reshape(-1, size * dim)
                blocks[mx.array(where.astype(np.uint32))] = new.reshape(heads, -1)
                layer.arrays[i] = blocks.reshape(-1, dim)
                at += old.nbytes

    def write(self, layer: int, slots: mx.array, k: mx.array, v: mx.array) -> None:
        """slots (T,); k, v (T, heads, dim)."""
        pages = self._layers[layer]
        tokens = self._group.pages * self._group.page_size
        where = (mx.arange(pages.heads)[:, None] * tokens + slots[None]).reshape(-1)
        for i, new in enumerate((k, v)):
            pages.arrays[i][where] = new.swapaxes(0, 1).reshape(-1, pages.dims[i])

    def page_view(self, layer: int, page: int) -> list[mx.array]:
        return self._layers[layer].page(page)


def _bytes(array: mx.array) -> bytes:
    return np.array(mx.contiguous(array).view(mx.uint8)).tobytes()
