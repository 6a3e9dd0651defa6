"""A small paged attention backend in plain torch operations, of fixed shape: the one that tests of
captured steps capture. Every row gathers all the pages that its table has room for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sixfold.common.ops.attention import flat_slots
from sixfold.platforms.interface import DeviceFacts
from sixfold.platforms.interface_attention import AttentionSpec
from sixfold.platforms.interface_kv import KVGroup, KVLayout
from sixfold.platforms.interface_step import StepBatch
from sixfold.platforms.torch_runtime.device import TorchDevice
from sixfold.platforms.torch_runtime.pools import TorchKVPool


@dataclass(frozen=True, slots=True)
class Plan:
    group: KVGroup
    table: np.ndarray  # (R, P)
    slots: np.ndarray  # (T,)
    row_of: np.ndarray  # (T,)
    positions: np.ndarray  # (T,)


@dataclass(slots=True)
class Bound:
    table: Tensor
    slots: Tensor
    row_of: Tensor
    positions: Tensor


class PlainPaged:
    name = "plain"

    def __init__(self, device: TorchDevice) -> None:
        self._device = device

    def accepts(self, spec: AttentionSpec, facts: DeviceFacts) -> tuple[str, ...]:
        return ("has no sinks",) if spec.sinks else ()

    def layout(self, group: KVGroup, spec: AttentionSpec, layers: int) -> KVLayout:
        axes = ("layer", "page", "token", "kv", "head", "dim")
        shape = (layers, group.pages, group.page_size, 2, spec.kv_heads, spec.head_dim)
        return KVLayout(axes, shape, spec.dtype)

    def plan(self, batch: StepBatch, group: KVGroup) -> Plan:
        table = batch.page_tables[group.name]
        lengths = np.diff(batch.query_start)
        row_of = np.repeat(np.arange(batch.rows), lengths)
        shift = np.repeat(batch.context_lens - batch.query_start[:-1], lengths)
        slots = flat_slots(table, batch.query_start, batch.context_lens, group.page_size)
        return Plan(group, table, slots, row_of, np.arange(len(row_of)) + shift)

    def reserve(self, group: KVGroup, rows: int, tokens: int, longest: int = 0) -> Bound:
        shapes = (rows, group.pages), (tokens,), (tokens,), (tokens,)
        return Bound(*(self._device.empty(shape, torch.int64) for shape in shapes))

    def bind(self, plan: Plan, reserved: Bound | None = None) -> Bound:
        rows, tokens = len(plan.table), len(plan.slots)
        bound = reserved or self.reserve(plan.group, rows, tokens)
        for name in ("table", "slots", "row_of", "positions"):
            buffer, values = getattr(bound, name), getattr(plan, name).astype(np.int64)
            buffer.zero_()
            where = tuple(slice(0, size) for size in values.shape)
            buffer[where].copy_(self._device.to_device(values))
        if tokens < len(bound.slots):  # rows of the null page, one token each
            bound.row_of[tokens:] = torch.arange(rows, len(bound.table))
        return bound

    def run(
        self,
        bound: Bound,
        pool: TorchKVPool,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        spec: AttentionSpec,
        sinks: Any = None,
    ) -> Tensor:
        pool.write(layer, bound.slots, k, v)
        rows = len(bound.table)
        past = pool.gather(layer, bound.table.view(-1)).view(rows, -1, 2, *k.shape[1:])
        keys, values = past.index_select(0, bound.row_of).unbind(2)
        distance = bound.positions.unsqueeze(1) - torch.arange(keys.shape[1], device=q.device)
        seen = distance >= 0
        if spec.window:
            seen = seen & (distance < spec.window)
        grouped = q.view(len(q), spec.kv_heads, -1, spec.head_dim)
        logits = torch.einsum("tghd,tkgd->tghk", grouped, keys).float() * spec.scale
        weights = logits.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1).to(v.dtype)
        values = values.masked_fill(~seen[:, :, None, None], 0.0)
        return torch.einsum("tghk,tkgd->tghd", weights, values).reshape(q.shape)
