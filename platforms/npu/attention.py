"""Fused infer attention of torch_npu over pages. Written against torch_npu 2.13.0's schemas and
the pages of op-plugin (`npu_fused_infer_attention_score`, `npu_scatter_pa_kv_cache`); not yet run
on a device.

The op has a branch for single queries, which takes all rows that decode in one call, and one for
many, which takes each other row in a call of its own: a padded batch would compute the padding.
The layout TND, which needs no padding, is documented with pages for latent attention only.

Lengths come from the host. In a captured step they are those of the plan that was bound last, for
each call is then a task of `graphs.launch`.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...common.errors import KernelError
from ..interface import DeviceFacts
from ..interface_attention import AttentionSpec
from ..interface_kv import KVGroup, KVLayout
from ..interface_step import StepBatch
from ..torch_runtime.device import TorchDevice
from ..torch_runtime.paged_rows import PagedRows, plan_rows, table_width
from ..torch_runtime.pools import TorchKVPool
from .graphs import Arguments, check_room, launch, unique_slots
from .library import PACKAGE, refusal

PAGES = (128, 256, 384, 512)
"""Tokens of a page that both branches of the op take."""
TRIANGLE = 2048
"""Side of the mask that stands for a causal one or a band of any size."""
LARGEST_TENSOR = 2**31 - 1
MOST_SHARING, MOST_HEADS, WIDEST = 64, 256, 65535
CAUSAL, BAND = 3, 4  # sparse modes, both from the lower right corner


@dataclass(frozen=True, slots=True)
class Part:
    """One call: the rows that decode, or one row with more queries."""

    tokens: Tensor | slice  # which of the step's
    table: Tensor  # (B, P) int32 blocks of keys
    queries: int  # of each row
    keys: list[int]  # the op takes lengths from the host; changed in place where reserved
    hidden: Tensor | None  # bool: (B, P * page size) of single queries in a window; the triangle
    reserved: bool = False


@dataclass(frozen=True, slots=True)
class Bound:
    slots: Tensor  # (T,) int64, in blocks of keys
    parts: tuple[Part, ...]


class FusedInferAttention:
    """AttentionBackend. A page is a block of keys and then one of values, so that one block table
    serves both: the values' tensor is the keys', one block later."""

    name = "fused_infer"
    page_size = PAGES[0]  # when the user names none

    def __init__(self, device: TorchDevice) -> None:
        self._device = device
        self._triangle: Tensor | None = None

    def accepts(self, spec: AttentionSpec, facts: DeviceFacts) -> tuple[str, ...]:
        return refusals(spec, facts)

    def layout(self, group: KVGroup, spec: AttentionSpec, layers: int) -> KVLayout:
        """Raises KernelError for pages that the op does not take; others it reads wrongly without
        a word."""
        if group.page_size not in PAGES:
            sizes = ", ".join(map(str, PAGES))
            raise KernelError(
                f"attention kernel fused_infer wants pages of {sizes} tokens, not "
                f"{group.page_size}; set --page-size 128 or --kernel attention=sdpa."
            )
        elements = 2 * group.pages * group.page_size * spec.kv_heads * spec.head_dim
        if elements > LARGEST_TENSOR:
            raise KernelError(
                f"attention kernel fused_infer counts the elements of a layer's cache in 32 bits, "
                f"{elements} are too many; lower --cache-tokens or set --kernel attention=sdpa."
            )
        axes = ("layer", "page", "kv", "token", "head", "dim")
        shape = (layers, group.pages, 2, group.page_size, spec.kv_heads, spec.head_dim)
        return KVLayout(axes, shape, spec.dtype)

    def plan(self, batch: StepBatch, group: KVGroup) -> PagedRows:
        return plan_rows(batch, group)

    def reserve(self, group: KVGroup, rows: int, tokens: int, longest: int) -> Bound:
        """Room for decode steps. Raises KernelError."""
        if rows != tokens:
            raise KernelError("attention kernel fused_infer captures steps of one token a row")
        check_room(rows, group.page_size, group.pages)
        width, empty = table_width(group, longest), self._device.empty
        table = empty((rows, width), torch.int32).zero_()
        hidden = None
        if group.window:
            hidden = empty((rows, width * group.page_size), torch.bool).zero_()
        part = Part(slice(None), table, 1, [1] * rows, hidden, reserved=True)
        return Bound(empty((rows,), torch.int64).zero_(), (part,))

    def bind(self, plan: PagedRows, reserved: Bound | None = None) -> Bound:
        """Raises KernelError where the plan does not fit what is reserved."""
        size = plan.group.page_size
        if reserved is not None:
            return self._fill(plan.padded(len(reserved.slots)), reserved)
        counts = np.diff(plan.query_start)
        parts = [self._one(plan, int(row)) for row in np.flatnonzero(counts > 1)]
        if len(parts) < plan.rows:
            parts.append(self._decoding(plan, np.flatnonzero(counts == 1)))
        return Bound(self._device.to_device(key_slots(plan.slots, size)), tuple(parts))

    def _fill(self, plan: PagedRows, reserved: Bound) -> Bound:
        """`plan` has as many rows as there is room for."""
        (part,) = reserved.parts
        if plan.table.shape[1] > part.table.shape[1]:
            listed, room = plan.table.shape[1], part.table.shape[1]
            raise KernelError(f"A step lists {listed} pages of a row, its room has {room}.")
        size, to_device = plan.group.page_size, self._device.to_device
        reserved.slots.copy_(to_device(unique_slots(key_slots(plan.slots, size), size)))
        part.table.zero_()
        part.table[:, : plan.table.shape[1]].copy_(to_device(2 * plan.table))
        part.keys[:] = plan.keys.tolist()
        if part.hidden is not None:
            part.hidden.copy_(to_device(out_of_window(plan, part.hidden.shape[1])))
        return reserved

    def _one(self, plan: PagedRows, row: int) -> Part:
        begin, end = int(plan.query_start[row]), int(plan.query_start[row + 1])
        count = int(plan.page_counts[row])
        table = self._device.to_device(2 * plan.table[row : row + 1, :count])
        keys = [int(plan.keys[row])]
        return Part(slice(begin, end), table, end - begin, keys, self._mask())

    def _decoding(self, plan: PagedRows, rows: Any) -> Part:
        to_device = self._device.to_device
        table, keys = plan.table[rows], plan.keys[rows]
        hidden = None
        if plan.group.window:
            whole = out_of_window(plan, table.shape[1] * plan.group.page_size)
            hidden = to_device(whole[rows])
        tokens = slice(None) if plan.decodes else to_device(plan.query_start[rows].astype(np.int64))
        return Part(tokens, to_device(2 * table), 1, keys.tolist(), hidden)

    def run(
        self,
        bound: Bound,
        pool: TorchKVPool,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        spec: AttentionSpec,
        sinks: Tensor | None = None,
    ) -> Tensor:
        blocks = pool.data[layer].flatten(0, 1)  # (2 * pages, size, heads, dim)
        keys, values = blocks[:-1], blocks[1:]
        import_module(PACKAGE).npu_scatter_pa_kv_cache(
            k.contiguous(), v.contiguous(), keys, values, bound.slots, cache_mode="Norm"
        )
        keys, values = keys.flatten(2), values.flatten(2)
        if len(bound.parts) == 1 and isinstance(bound.parts[0].tokens, slice):
            return self._call(bound.parts[0], q, keys, values, spec)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for part in bound.parts:
            out[part.tokens] = self._call(part, q[part.tokens], keys, values, spec)
        return out

    def _call(
        self, part: Part, q: Tensor, keys: Tensor, values: Tensor, spec: AttentionSpec
    ) -> Tensor:
        options: dict[str, Any] = {}
        if part.queries > 1:
            options = {"sparse_mode": CAUSAL}
            if spec.window:
                options = {"sparse_mode": BAND, "pre_tokens": spec.window - 1, "next_tokens": 0}
        query = q.reshape(len(part.keys), part.queries, -1).contiguous()

        def arguments() -> dict[str, Any]:
            return {
                "query": query,
                "key": keys,
                "value": values,
                "actual_seq_lengths": [part.queries] * len(part.keys),
                "actual_seq_lengths_kv": list(part.keys),
                "block_table": part.table,
                "atten_mask": part.hidden,
                "num_heads": spec.heads,
                "num_key_value_heads": spec.kv_heads,
                "scale": spec.scale,
                "input_layout": "BSH",
                "block_size": keys.shape[1],
                **options,
            }

        return (_recordable if part.reserved else _plain)(query, arguments).view(q.shape)

    def _mask(self) -> Tensor:
        """True where a key is hidden."""
        if self._triangle is None:
            whole = np.triu(np.ones((TRIANGLE, TRIANGLE), np.bool_), 1)
            self._triangle = self._device.to_device(whole)
        return self._triangle


def _plain(query: Tensor, arguments: Arguments) -> Tensor:
    result: Tensor = import_module(PACKAGE).npu_fused_infer_attention_score(**arguments())[0]
    return result


def _recordable(query: Tensor, arguments: Arguments) -> Tensor:
    """Into tensors of our own, so that the call can be made again for the same ones."""
    library = import_module(PACKAGE)
    workspace = library._npu_fused_infer_attention_score_get_max_workspace(**arguments())
    out = [torch.empty_like(query), query.new_empty(1)]
    call = library.npu_fused_infer_attention_score.out
    launch(call, lambda: {**arguments(), "workspace": workspace, "out": out})
    return out[0]


def key_slots(slots: Any, page_size: int) -> Any:
    """Slots of pages -> of blocks of keys, int64: every other block holds values."""
    wide = slots.astype(np.int64)
    return wide + wide // page_size * page_size


def out_of_window(plan: PagedRows, width: int) -> Any:
    """(R, width) bool, of the keys that single queries do not see any more."""
    return np.arange(width) < plan.keys[:, None] - plan.group.window


def refusals(spec: AttentionSpec, facts: DeviceFacts) -> tuple[str, ...]:
    """All reasons why the op cannot serve `spec` on a device with these facts."""
    reason = refusal(facts)
    reasons = [] if reason is None else [reason]
    if spec.head_dim % 16 or spec.head_dim > 512:
        reasons.append(f"head sizes in steps of 16 up to 512, not {spec.head_dim}")
    if spec.heads % spec.kv_heads:
        reasons.append(f"{spec.heads} heads do not divide among {spec.kv_heads} kv heads")
    elif spec.heads // spec.kv_heads > MOST_SHARING or spec.heads > MOST_HEADS:
        reasons.append(f"up to {MOST_HEADS} heads, {MOST_SHARING} of them to a kv head")
    if spec.kv_heads * spec.head_dim > WIDEST:
        reasons.append(f"keys of a token of up to {WIDEST} numbers")
    if spec.dtype not in ("bfloat16", "float16"):
        reasons.append(f"serves bfloat16 and float16, not {spec.dtype}")
    if spec.stored_dtype != spec.dtype:
        reasons.append(f"keeps keys and values in {spec.dtype}, not {spec.stored_dtype}")
    if spec.soft_cap:
        reasons.append("it has no soft cap")
    if spec.sinks:
        reasons.append("its argument for sinks is not documented")
    return tuple(reasons)
