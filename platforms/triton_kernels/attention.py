"""The Triton attention backend: prefill and decode in place over the pages, in one call.

Keys and values of a page's head are one piece of memory (layer, page, head, kv, token, dim). A plan
becomes one array of integers; with `reserve` it lies at fixed addresses, and what a run launches
depends on the reservation alone, so that a device graph can hold it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...common.errors import KernelError
from ..cache_plan import kv_row_bytes
from ..interface import DeviceFacts
from ..interface_attention import AttentionSpec
from ..interface_kv import KVGroup, KVLayout
from ..interface_step import StepBatch
from ..torch_runtime.device import TorchDevice
from ..torch_runtime.dtypes import DTYPES, KV_DTYPES
from ..torch_runtime.pools import TorchKVPool
from .attention_kernels import attention_kernel, merge_kernel
from .attention_plan import FIELDS, Room, TritonPlan, exact_room, pack, plan_step
from .int8_pages import STEP_BYTES, write_int8_pages
from .launch import heads_of
from .paging import write_pages
from .tuning import Tile, Tuning, choose, power_of_two, refusal

LARGEST_DIM, LARGEST_GROUP = 256, 64
LEAST_DEPTH = 16
"""Of a product's inner dimension, on every matrix unit there is."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """How one group's attention is cut on this device."""

    narrow: Tile
    wide: Tile
    group: int  # query heads of a kv head

    @property
    def queries(self) -> tuple[int, int]:
        """Most queries of a narrow and of a wide item."""
        return self.narrow.block_m // self.group, self.wide.block_m // self.group


class BoundPlan:
    """A plan's array on the device, and room for partial results. `buffer` begins with what `Room`
    has; its pages are the rest. Good for every layer of its group, until the next `bind` to it."""

    def __init__(self, room: Room, buffer: Tensor, partial: Tensor, stats: Tensor) -> None:
        self.room, self.buffer = room, buffer
        self.partial, self.stats = partial, stats
        narrow = room.tokens + room.narrow * FIELDS
        self.slots = buffer[: room.tokens]
        self.narrow = buffer[room.tokens : narrow]
        self.wide = buffer[narrow : room.pages_at]
        self.pages = buffer[room.pages_at :]

    def fill(self, plan: TritonPlan) -> None:
        """Raises KernelError when the plan does not fit."""
        packed = torch.from_numpy(pack(plan, self.room))
        if len(packed) > len(self.buffer):
            places = len(self.buffer) - self.room.pages_at
            raise KernelError(f"A step lists {len(plan.pages)} pages, its room has {places}.")
        self.buffer[: len(packed)].copy_(packed)


class TritonAttention:
    """AttentionBackend for every device that Triton compiles for. `layout` must be called for a
    group before `plan`, `reserve` or `bind`."""

    name = "triton"

    def __init__(self, device: TorchDevice) -> None:
        self._device = device
        self._tuning = choose(device.facts)
        self._specs: dict[str, AttentionSpec] = {}
        self._scratch = device.empty((0,), torch.float32)

    def accepts(self, spec: AttentionSpec, facts: DeviceFacts) -> tuple[str, ...]:
        return refusals(spec, facts)

    def layout(self, group: KVGroup, spec: AttentionSpec, layers: int) -> KVLayout:
        axes = ("layer", "page", "head", "kv", "token", "dim")
        row = (
            kv_row_bytes(spec.stored_dtype, spec.head_dim) // KV_DTYPES[spec.stored_dtype].itemsize
        )
        shape = (layers, group.pages, spec.kv_heads, 2, group.page_size, row)
        self._specs[group.name] = spec
        return KVLayout(axes, shape, spec.stored_dtype)

    def plan(self, batch: StepBatch, group: KVGroup) -> TritonPlan:
        return plan_step(batch, group)

    def reserve(self, group: KVGroup, rows: int, tokens: int, longest: int) -> BoundPlan:
        """Buffers for steps of at most so many rows and tokens, at addresses that stay. `longest`
        is the most tokens of a row with its context."""
        room = Room.bucket(rows, tokens, *self._tiles(group).queries)
        pages = min(group.pages, -(-longest // group.page_size) + 1)
        buffer = self._device.empty((room.pages_at + rows * pages,), torch.int32)
        buffer.zero_()
        return self._bound(group, room, buffer)

    def bind(self, plan: TritonPlan, reserved: BoundPlan | None = None) -> BoundPlan:
        """The plan on the device: in place in `reserved`, which is returned, or in a buffer of its
        own. Raises KernelError when it does not fit."""
        if reserved is not None:
            reserved.fill(plan)
            return reserved
        room = exact_room(plan, *self._tiles(plan.group).queries)
        return self._bound(plan.group, room, self._device.to_device(pack(plan, room)))

    def run(
        self,
        bound: BoundPlan,
        pool: TorchKVPool,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        spec: AttentionSpec,
        sinks: Tensor | None = None,
    ) -> Tensor:
        data = pool.data[layer]  # (page, head, kv, token, dim)
        keys, values = data.permute(2, 0, 3, 1, 4).unbind(0)
        write = write_int8_pages if data.dtype == torch.int8 else write_pages
        write(self._tuning, keys, values, bound.slots, k, v)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        tiles, room = self._tiles(pool.group), bound.room
        heads = heads_of(q)
        if room.narrow:
            splits = self._tuning.splits
            self._attend(bound, bound.narrow, tiles.narrow, splits, data, heads, out, spec, sinks)
            self._merge(bound, tiles.narrow, out, spec, sinks)
        if room.wide:
            self._attend(bound, bound.wide, tiles.wide, 1, data, heads, out, spec, sinks)
        return out

    def _attend(
        self,
        bound: BoundPlan,
        items: Tensor,
        tile: Tile,
        splits: int,
        data: Tensor,
        q: Tensor,
        out: Tensor,
        spec: AttentionSpec,
        sinks: Tensor | None,
    ) -> None:
        attention_kernel[(len(items) // FIELDS, spec.kv_heads, splits)](
            q,
            data,
            data.view(torch.float32) if data.dtype == torch.int8 else data,
            out,
            bound.partial,
            bound.stats,
            bound.stats if sinks is None else sinks,
            items,
            bound.pages,
            spec.scale,
            spec.soft_cap,
            *q.stride()[:2],
            HEADS=spec.heads,
            KV_HEADS=spec.kv_heads,
            DIM=spec.head_dim,
            PAGE_SIZE=data.shape[3],
            WINDOW=spec.window,
            CAPPED=spec.soft_cap != 0,
            INT8=data.dtype == torch.int8,
            SINKS=sinks is not None,
            SPLITS=splits,
            LEAST=self._tuning.least_blocks,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_D=_block_d(spec),
            **tile.launch,
        )

    def _merge(
        self, bound: BoundPlan, tile: Tile, out: Tensor, spec: AttentionSpec, sinks: Tensor | None
    ) -> None:
        block_d = _block_d(spec)
        merge_kernel[(bound.room.narrow, spec.heads)](
            out,
            bound.partial,
            bound.stats,
            bound.stats if sinks is None else sinks,
            bound.narrow,
            HEADS=spec.heads,
            DIM=spec.head_dim,
            SINKS=sinks is not None,
            SPLITS=self._tuning.splits,
            LEAST=self._tuning.least_blocks,
            BLOCK_N=tile.block_n,
            BLOCK_D=block_d,
            num_warps=self._tuning.warps(self._tuning.splits * block_d),
        )

    def _tiles(self, group: KVGroup) -> Tiles:
        spec = self._specs[group.name]
        cut = self._tuning
        tiles = (cut.narrow, cut.wide)
        if spec.dtype == "float32":
            tiles = (cut.narrow_float32, cut.wide_float32)
        narrow, wide = (_fitted(tile, spec, cut) for tile in tiles)
        return Tiles(narrow, wide, spec.heads // spec.kv_heads)

    def _bound(self, group: KVGroup, room: Room, buffer: Tensor) -> BoundPlan:
        """Partial results live between two launches of one stream, so all plans share their memory.
        A reservation keeps what it was given when more is taken later."""
        spec = self._specs[group.name]
        places = room.partial_tokens * spec.heads * self._tuning.splits
        need = places * (spec.head_dim + 2)
        if need > len(self._scratch):
            self._scratch = self._device.empty((need,), torch.float32)
        partial = self._scratch[: places * spec.head_dim]
        return BoundPlan(room, buffer, partial, self._scratch[places * spec.head_dim :])


def refusals(spec: AttentionSpec, facts: DeviceFacts) -> tuple[str, ...]:
    """All reasons why the backend cannot serve `spec` on a device with these facts."""
    device = refusal(facts)
    reasons = [device] if device else []
    if spec.heads % spec.kv_heads:
        reasons.append(f"{spec.heads} heads do not divide among {spec.kv_heads} kv heads")
    elif spec.heads // spec.kv_heads > LARGEST_GROUP:
        group = spec.heads // spec.kv_heads
        reasons.append(f"up to {LARGEST_GROUP} heads of a kv head, not {group}")
    if spec.head_dim > LARGEST_DIM:
        reasons.append(f"head sizes up to {LARGEST_DIM}, not {spec.head_dim}")
    elif spec.dtype == "float32" and not device and spec.head_dim > choose(facts).float32_dim:
        widest = choose(facts).float32_dim
        reasons.append(f"head sizes up to {widest} in float32, not {spec.head_dim}")
    if spec.dtype not in DTYPES:
        reasons.append(f"serves {', '.join(DTYPES)}, not {spec.dtype}")
    elif spec.dtype not in facts.dtypes:
        reasons.append(f"{facts.name} does not compute in {spec.dtype}")
    if spec.stored_dtype not in (spec.dtype, "int8"):
        reasons.append(f"keeps keys and values in {spec.dtype} or int8, not {spec.stored_dtype}")
    elif spec.stored_dtype == "int8" and spec.head_dim % STEP_BYTES:
        reasons.append(f"int8 rows of multiples of {STEP_BYTES} numbers, not {spec.head_dim}")
    return tuple(reasons)


def _block_d(spec: AttentionSpec) -> int:
    return max(LEAST_DEPTH, power_of_two(spec.head_dim))


def _fitted(tile: Tile, spec: AttentionSpec, tuning: Tuning) -> Tile:
    """The table's tile: fewer keys and queries where heads are wide, and fewer stages where they
    would not fit the shared memory; but rows for all heads of a kv head."""
    block_d, itemsize = _block_d(spec), DTYPES[spec.dtype].itemsize
    group = power_of_two(spec.heads // spec.kv_heads)
    # Codes of eight bits lie in registers beside what they are widened to.
    held = itemsize * (2 if spec.stored_dtype == "int8" else 1)
    block_n = min(tile.block_n, max(LEAST_DEPTH, tuning.keys_bytes // (block_d * held)))
    block_m = min(tile.block_m, max(LEAST_DEPTH, tuning.sums_bytes // (block_d * 4)))
    block_m, stages = max(block_m, group), tile.stages
    each = block_d * itemsize
    while stages > 1 and each * (block_m + 2 * block_n * stages) > tuning.shared_bytes:
        stages -= 1
    return Tile(block_m, block_n, tile.warps, stages)
