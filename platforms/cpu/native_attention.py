"""The native attention backend: one call for all rows of a step, read from the pages in place.

The host side cuts the step into pieces of work: blocks of a row's queries, or, where a row decodes
over a long context, parts of its keys whose partial results are merged. A row's parts follow from
its own context alone: its result is the same to the bit whatever else is in the step. A group's
plan lies at a fixed address, so that recorded instructions find each new step there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ...common.ops.attention import flat_slots
from ..cache_plan import kv_row_bytes
from ..interface import DeviceFacts
from ..interface_attention import AttentionSpec
from ..interface_kv import KVGroup, KVLayout
from ..interface_step import StepBatch
from ..torch_runtime.dtypes import KV_DTYPES
from ..torch_runtime.pools import TorchKVPool
from .native_library import PlanStruct, SpecStruct
from .native_ops import ATTENTION, KV_WRITE, MERGE, Issuer

I32 = NDArray[np.int32]

QUERY_BLOCK = 32
"""Queries of one piece of a prefill."""

PART_KEYS = 256
"""Keys of one part of a row that decodes; at most half as many more in the last."""

LARGEST_DIM = 512

FORMATS = {"float32": 0, "bfloat16": 1, "float16": 2, "int8": 3}
"""Dtypes of keys and values -> Format of program.h."""


@dataclass(frozen=True, slots=True)
class NativePlan:
    """Arrays of PlanStruct; the work list holds `splits` parts of rows first."""

    group: KVGroup
    table: I32
    query_start: I32
    context: I32
    slots: NDArray[np.int64]
    work: I32  # (pieces, 5): row, first query, last query, first key, last key
    splits: int
    merges: I32  # (n, 3): token, first part, last part


def _address(array: NDArray[Any]) -> int:
    """As `array.ctypes.data`, which makes objects on the way and counts in a step of one row."""
    return int(array.__array_interface__["data"][0])


class GroupPlan:
    """The struct of one group at its fixed address, and what it points at."""

    def __init__(self) -> None:
        self.struct = PlanStruct()
        self.address = ctypes.addressof(self.struct)
        self._held: tuple[Any, ...] = ()
        self._partials = np.empty(0, np.float32)

    def fill(self, plan: NativePlan, heads: int, dim: int) -> None:
        floats = plan.splits * heads * (dim + 2)
        if floats > len(self._partials):
            self._partials = np.empty(floats, np.float32)
        arrays = {
            name: np.ascontiguousarray(getattr(plan, name))
            for name in ("table", "query_start", "context", "slots", "work", "merges")
        }
        struct = self.struct
        struct.rows, struct.table_width = plan.table.shape
        struct.page_size = plan.group.page_size
        struct.tokens = len(plan.slots)
        struct.pieces, struct.splits = len(plan.work), plan.splits
        struct.merge_count = len(plan.merges)
        for name, array in arrays.items():
            setattr(struct, name, _address(array))
        struct.partials = _address(self._partials)
        self._held = tuple(arrays.values())


class NativeAttention:
    """AttentionBackend on the native kernels: computes in float32, keeps keys and values in the
    spec's `kv_dtype`."""

    name = "native"

    def __init__(self, issuer: Issuer) -> None:
        self._issuer = issuer
        self._groups: dict[str, tuple[GroupPlan, AttentionSpec]] = {}
        self._specs: dict[AttentionSpec, SpecStruct] = {}

    def accepts(self, spec: AttentionSpec, facts: DeviceFacts) -> tuple[str, ...]:
        reasons = []
        if spec.heads % spec.kv_heads:
            reasons.append(f"{spec.heads} heads do not divide among {spec.kv_heads} kv heads")
        if spec.dtype != "float32":
            reasons.append(f"serves float32, not {spec.dtype}")
        if spec.stored_dtype not in FORMATS:
            reasons.append(f"keeps {', '.join(FORMATS)}, not {spec.stored_dtype}")
        if spec.scale <= 0:
            reasons.append(f"scales above 0, not {spec.scale}")
        if spec.head_dim > LARGEST_DIM:
            reasons.append(f"head sizes up to {LARGEST_DIM}, not {spec.head_dim}")
        return tuple(reasons)

    def layout(self, group: KVGroup, spec: AttentionSpec, layers: int) -> KVLayout:
        """(layer, page, head, kv, token, dim): what a task reads of a page is one piece."""
        axes = ("layer", "page", "head", "kv", "token", "dim")
        stored = spec.stored_dtype
        row = kv_row_bytes(stored, spec.head_dim) // KV_DTYPES[stored].itemsize
        shape = (layers, group.pages, spec.kv_heads, 2, group.page_size, row)
        self._groups[group.name] = (GroupPlan(), spec)
        return KVLayout(axes, shape, stored)

    def plan(self, batch: StepBatch, group: KVGroup) -> NativePlan:
        return plan_step(batch, group)

    def reserve(self, group: KVGroup, rows: int, tokens: int, longest: int) -> GroupPlan:
        """The group's one place, which grows with its plans."""
        return self._groups[group.name][0]

    def bind(self, plan: NativePlan, reserved: GroupPlan | None = None) -> GroupPlan:
        """Into the group's one place, reserved or not."""
        bound, spec = self._groups[plan.group.name]
        bound.fill(plan, spec.heads, spec.head_dim)
        return bound

    def run(
        self,
        bound: GroupPlan,
        pool: TorchKVPool,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        spec: AttentionSpec,
        sinks: Tensor | None = None,
    ) -> Tensor:
        rows = len(q)
        q, k, v = (x.flatten(1) for x in (q, k, v))
        data = pool.data[layer].data_ptr()
        issuer = self._issuer
        struct = self._spec(spec)
        issuer.issue(
            KV_WRITE,
            rows,
            (k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0), data, struct, bound.address),
        )
        out = issuer.empty(rows, spec.heads * spec.head_dim)
        sink = 0 if sinks is None else sinks.data_ptr()
        args = (q.data_ptr(), q.stride(0), data, out.data_ptr(), struct, bound.address, sink)
        issuer.issue(ATTENTION, rows, args)
        if issuer.is_recording or bound.struct.merge_count:
            issuer.issue(MERGE, rows, (out.data_ptr(), struct, bound.address, sink))
        return out.view(rows, spec.heads, spec.head_dim)

    def _spec(self, spec: AttentionSpec) -> int:
        if spec not in self._specs:
            self._specs[spec] = SpecStruct(
                spec.heads,
                spec.kv_heads,
                spec.head_dim,
                spec.window,
                spec.scale,
                spec.soft_cap,
                FORMATS[spec.stored_dtype],
                kv_row_bytes(spec.stored_dtype, spec.head_dim),
            )
        return ctypes.addressof(self._specs[spec])


def _blocks(batch: StepBatch, new: NDArray[np.integer]) -> Iterator[tuple[int, int, int]]:
    """(row, first query, last query) of each piece before its keys are cut. A row with drafts goes
    query by query, as it would without them: the results are then the same to the bit."""
    drafts = 0 * new if batch.draft_counts is None else batch.draft_counts
    for row, (count, guesses) in enumerate(zip(new.tolist(), drafts.tolist(), strict=True)):
        size = 1 if guesses else QUERY_BLOCK
        for query in range(0, count, size):
            yield row, query, min(query + size, count)


def plan_step(batch: StepBatch, group: KVGroup) -> NativePlan:
    table = batch.page_tables[group.name]
    slots = flat_slots(table, batch.query_start, batch.context_lens, group.page_size)
    new = batch.query_start[1:] - batch.query_start[:-1]
    parts: list[tuple[int, ...]] = []
    whole: list[tuple[int, ...]] = []
    merges = []
    for row, query, last in _blocks(batch, new):
        context = int(batch.context_lens[row])
        end = context + last
        # Keys that the row's first query sees; those of a query alone where it is one.
        first = context + query if last - query == 1 else context
        begin = max(0, first - group.window + 1) if group.window else 0
        edges = [*range(begin, end - PART_KEYS // 2, PART_KEYS), end]
        if last - query == 1 and len(edges) > 2:
            pieces = len(edges) - 1
            token = int(batch.query_start[row]) + query
            merges.append((token, len(parts), len(parts) + pieces))
            parts += [(row, query, last, *span) for span in pairwise(edges)]
        else:
            whole.append((row, query, last, begin, end))
    # Long pieces first: the last task to start should be a short one.
    whole.sort(key=lambda piece: piece[3] - piece[4])
    work = np.array(parts + whole, np.int32).reshape(-1, 5)
    joined = np.array(merges, np.int32).reshape(-1, 3)
    return NativePlan(
        group,
        table.astype(np.int32, copy=False),
        batch.query_start.astype(np.int32, copy=False),
        batch.context_lens.astype(np.int32, copy=False),
        slots,
        work,
        len(parts),
        joined,
    )
