"""Attention of AMD's aiter library: one Triton call for prefill and decode over pages. Written
against amd-aiter 0.1.7 (`aiter/ops/triton/unified_attention.py`, `unified_attention`); not yet run
on a device.

The library chooses between its two kernels by numbers on the host, the longest query and the most
keys: of a captured bucket they are those of the bucket.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

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
from .aiter_library import refusal

HEAD_DIMS = (64, 128, 256)
"""Powers of two up to 256; other sizes would be padded, and were not looked at."""
LEAST_PAGE = 16
"""Tokens of a page are the inner side of a product."""


@dataclass(frozen=True, slots=True)
class Bound:
    slots: Tensor  # (T,) int64
    query_start: Tensor  # (R+1,) int32
    keys: Tensor  # (R,) int32
    table: Tensor  # (R, P) int32
    longest_query: int
    most_keys: int


class AiterAttention:
    name = "aiter"

    def __init__(self, device: TorchDevice) -> None:
        self._device = device

    def accepts(self, spec: AttentionSpec, facts: DeviceFacts) -> tuple[str, ...]:
        return refusals(spec, facts)

    def layout(self, group: KVGroup, spec: AttentionSpec, layers: int) -> KVLayout:
        """Raises KernelError for pages that the kernels cannot read."""
        if group.page_size < LEAST_PAGE or group.page_size & (group.page_size - 1):
            raise KernelError(
                f"attention kernel aiter wants pages of a power of two of tokens, {LEAST_PAGE} or "
                f"more, not {group.page_size}; set --page-size or --kernel attention=triton."
            )
        axes = ("layer", "page", "token", "kv", "head", "dim")
        shape = (layers, group.pages, group.page_size, 2, spec.kv_heads, spec.head_dim)
        return KVLayout(axes, shape, spec.dtype)

    def plan(self, batch: StepBatch, group: KVGroup) -> PagedRows:
        return plan_rows(batch, group)

    def reserve(self, group: KVGroup, rows: int, tokens: int, longest: int) -> Bound:
        """Raises KernelError for shapes other than one token a row."""
        if tokens != rows:
            raise KernelError("attention kernel aiter is captured for steps that decode only")
        empty, width = self._device.empty, table_width(group, longest)
        return Bound(
            empty((rows,), torch.int64),
            empty((rows + 1,), torch.int32),
            empty((rows,), torch.int32),
            empty((rows, width), torch.int32).zero_(),
            longest_query=1,
            most_keys=width * group.page_size,
        )

    def bind(self, plan: PagedRows, reserved: Bound | None = None) -> Bound:
        if reserved is None:
            to_device = self._device.to_device
            return Bound(
                to_device(plan.slots.astype(np.int64)),
                to_device(plan.query_start),
                to_device(plan.keys),
                to_device(plan.table),
                plan.longest_query,
                int(plan.keys.max()),
            )
        plan = plan.padded(len(reserved.keys))
        reserved.slots.copy_(torch.from_numpy(plan.slots.astype(np.int64)))
        reserved.query_start.copy_(torch.from_numpy(plan.query_start))
        reserved.keys.copy_(torch.from_numpy(plan.keys))
        reserved.table[:, : plan.table.shape[1]].copy_(torch.from_numpy(plan.table))
        return reserved

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
        pool.write(layer, bound.slots, k, v)
        keys, values = pool.tokens[layer].unbind(2)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        import_module("aiter.ops.triton.unified_attention").unified_attention(
            q=q,
            k=keys,
            v=values,
            out=out,
            cu_seqlens_q=bound.query_start,
            max_seqlen_q=bound.longest_query,
            seqused_k=bound.keys,
            max_seqlen_k=bound.most_keys,
            softmax_scale=spec.scale,
            causal=True,
            window_size=(spec.window - 1, 0),  # the library adds 1: 0 is no window
            block_table=bound.table,
            softcap=spec.soft_cap,
            q_descale=None,
            k_descale=None,
            v_descale=None,
            sinks=sinks,
        )
        return out


def refusals(spec: AttentionSpec, facts: DeviceFacts) -> tuple[str, ...]:
    """All reasons why the library cannot serve `spec` on a device with these facts."""
    reason = refusal(facts)
    reasons = [] if reason is None else [reason]
    if spec.head_dim not in HEAD_DIMS:
        reasons.append(f"head sizes {', '.join(map(str, HEAD_DIMS))}, not {spec.head_dim}")
    if spec.heads % spec.kv_heads:
        reasons.append(f"{spec.heads} heads do not divide among {spec.kv_heads} kv heads")
    if spec.dtype not in ("bfloat16", "float16"):
        reasons.append(f"serves bfloat16 and float16, not {spec.dtype}")
    if spec.stored_dtype != spec.dtype:
        reasons.append(f"keeps keys and values in {spec.dtype}, not {spec.stored_dtype}")
    return tuple(reasons)
