"""Fused infer attention of torch_npu over pages. Written against torch_npu 2.13.0's schemas and
the pages of op-plugin (`npu_fused_infer_attention_score`, `npu_scatter_pa_kv_cache`); not yet run
on a device.

The op has a branch for single queries, which takes all rows that decode in one call, and one for
many, which takes each other row in a call of its own: a padded batch would compute the padding.
The layout TND, which needs no padding, is documented with pages for latent attention only.
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
from ..torch_runtime.paged_rows import PagedRows, plan_rows
from ..torch_runtime.pools import TorchKVPool
from .library import refusal

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
    keys: list[int]  # the op takes lengths from the host
    hidden: Tensor | None  # (B, P * page size) bool, of single queries in a window


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

    def reserve(self, group: KVGroup, rows: int, tokens: int, longest: int) -> Any:
        """Raises KernelError."""
        raise KernelError("attention kernel fused_infer takes lengths from the host at each call")

    def bind(self, plan: PagedRows, reserved: Any = None) -> Bound:
        size = plan.group.page_size
        slots = plan.slots.astype(np.int64)
        slots += slots // size * size  # every other block holds values
        counts = np.diff(plan.query_start)
        parts = [self._one(plan, int(row)) for row in np.flatnonzero(counts > 1)]
        if len(parts) < plan.rows:
            parts.append(self._decoding(plan, np.flatnonzero(counts == 1)))
        return Bound(self._device.to_device(slots), tuple(parts))

    def _one(self, plan: PagedRows, row: int) -> Part:
        begin, end = int(plan.query_start[row]), int(plan.query_start[row + 1])
        count = int(plan.page_counts[row])
        table = self._device.to_device(2 * plan.table[row : row + 1, :count])
        return Part(slice(begin, end), table, end - begin, [int(plan.keys[row])], None)

    def _decoding(self, plan: PagedRows, rows: Any) -> Part:
        to_device = self._device.to_device
        table, keys = plan.table[rows], plan.keys[rows]
        hidden = None
        if plan.group.window:
            places = np.arange(table.shape[1] * plan.group.page_size)
            hidden = to_device(places < keys[:, None] - plan.group.window)
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
        import_module("torch_npu").npu_scatter_pa_kv_cache(
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
        many = part.queries > 1
        options: dict[str, Any] = {"atten_mask": part.hidden}
        if many:
            options = {"sparse_mode": CAUSAL}
            if spec.window:
                options = {"sparse_mode": BAND, "pre_tokens": spec.window - 1, "next_tokens": 0}
            options["atten_mask"] = self._mask()
        result: Tensor = import_module("torch_npu").npu_fused_infer_attention_score(
            q.reshape(len(part.keys), part.queries, -1).contiguous(),
            keys,
            values,
            actual_seq_lengths=[part.queries] * len(part.keys),
            actual_seq_lengths_kv=part.keys,
            block_table=part.table,
            num_heads=spec.heads,
            num_key_value_heads=spec.kv_heads,
            scale=spec.scale,
            input_layout="BSH",
            block_size=keys.shape[1],
            **options,
        )[0]
        return result.view(q.shape)

    def _mask(self) -> Tensor:
        """True where a key is hidden."""
        if self._triangle is None:
            whole = np.triu(np.ones((TRIANGLE, TRIANGLE), np.bool_), 1)
            self._triangle = self._device.to_device(whole)
        return self._triangle


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
