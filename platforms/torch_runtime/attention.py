"""The generic attention backend: paged context gathered, then torch's scaled_dot_product_attention.

Rows with one new token are batched with others of similar context: their pages are gathered into
one padded rectangle. Longer rows go one by one: those without context attend to the step's own keys
with a causal flag, others gather their context once per layer and attend in blocks of queries with
a mask. Keys and values of all rows are written before anything is read.
"""

from __future__ import annotations

from typing import NoReturn

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own spelling)
from torch import Tensor

from ...common.errors import KernelError
from ..interface import DeviceFacts
from ..interface_attention import AttentionSpec
from ..interface_kv import KVGroup, KVLayout
from ..interface_step import StepBatch
from .attention_plan import (
    I64,
    AttentionPlan,
    DecodeBlock,
    Piece,
    PrefillRow,
    plan_attention,
)
from .device import TorchDevice
from .dtypes import DTYPES
from .pools import TorchKVPool

# A decode block's gathered keys and values should stay in a CPU's last-level cache between being
# gathered and being read; larger blocks save no time elsewhere.
GATHER_BYTES = 8 << 20


class BoundDecode:
    """A DecodeBlock on the device. `bias` (rows, 1, 1, span) or None when every key is seen."""

    def __init__(self, block: DecodeBlock, device: TorchDevice, dtype: torch.dtype) -> None:
        self.rows = len(block.tokens)
        self.first, self.last = block.first, block.last
        self.tokens = None if block.everything else device.to_device(block.tokens)
        self.pages = _pages(block.pages, device)
        self.bias: Tensor | None = None
        if block.seen is not None:
            begin, end = (device.to_device(edge).unsqueeze(1) for edge in block.seen)
            position = torch.arange(self.first, self.last, device=device.torch_device)
            seen = (position >= begin) & (position < end)
            self.bias = _bias(seen, dtype).view(self.rows, 1, 1, -1)


class BoundPrefill:
    """A PrefillRow on the device; one bias (queries, keys) per piece, None when plainly causal."""

    def __init__(self, row: PrefillRow, device: TorchDevice, dtype: torch.dtype) -> None:
        self.start = row.start
        self.pages = None if row.pages is None else _pages(row.pages, device)
        self.pieces = [
            (piece, None if piece.causal else _band(piece, row, device, dtype))
            for piece in row.pieces
        ]


class BoundAttention:
    """A plan on the device, good for every layer of its group and for one step."""

    def __init__(self, plan: AttentionPlan, device: TorchDevice, dtype: torch.dtype) -> None:
        self.slots = device.to_device(plan.slots)
        self.fresh = device.to_device(plan.fresh) if len(plan.fresh) else None
        self.decodes = [BoundDecode(block, device, dtype) for block in plan.decodes]
        self.prefills = [BoundPrefill(row, device, dtype) for row in plan.prefills]


class SdpaAttention:
    """AttentionBackend on any torch device. `layout` must be called for a group before `plan`."""

    name = "sdpa"
    tree_masks = True

    def __init__(self, device: TorchDevice) -> None:
        self._device = device
        self._layouts: dict[str, KVLayout] = {}

    def accepts(self, spec: AttentionSpec, facts: DeviceFacts) -> tuple[str, ...]:
        reasons = []
        if spec.heads % spec.kv_heads:
            reasons.append(f"{spec.heads} heads do not divide among {spec.kv_heads} kv heads")
        if spec.stored_dtype != spec.dtype:
            reasons.append(f"keeps keys and values in {spec.dtype}, not {spec.stored_dtype}")
        if spec.tree and spec.window:
            reasons.append("has no tree masks within a window")
        return tuple(reasons)

    def layout(self, group: KVGroup, spec: AttentionSpec, layers: int) -> KVLayout:
        axes = ("layer", "page", "token", "kv", "head", "dim")
        shape = (layers, group.pages, group.page_size, 2, spec.kv_heads, spec.head_dim)
        layout = KVLayout(axes, shape, spec.dtype)
        self._layouts[group.name] = layout
        return layout

    def plan(self, batch: StepBatch, group: KVGroup) -> AttentionPlan:
        layout = self._layouts[group.name]
        _, _, _, _, heads, dim = layout.shape
        token_bytes = 2 * heads * dim * DTYPES[layout.dtype].itemsize
        return plan_attention(batch, group, max(1, GATHER_BYTES // token_bytes))

    def reserve(self, group: KVGroup, rows: int, tokens: int, longest: int) -> NoReturn:
        raise KernelError(
            "attention kernel sdpa gathers as many pages as the rows of a step have; of fixed "
            "shape, it would gather the longest context for every row"
        )

    def bind(self, plan: AttentionPlan, reserved: None = None) -> BoundAttention:
        return BoundAttention(plan, self._device, DTYPES[self._layouts[plan.group].dtype])

    def run(
        self,
        bound: BoundAttention,
        pool: TorchKVPool,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        spec: AttentionSpec,
        sinks: Tensor | None = None,
    ) -> Tensor:
        if bound.fresh is not None:
            pool.clear(layer, bound.fresh)
        pool.write(layer, bound.slots, k, v)
        result: Tensor | None = None
        for block in bound.decodes:
            part = _decode(block, pool, layer, q, spec, sinks)
            if block.tokens is None:
                return part
            result = torch.empty_like(q) if result is None else result
            result.index_copy_(0, block.tokens, part)
        result = torch.empty_like(q) if result is None else result
        for row in bound.prefills:
            _prefill(row, pool, layer, q, k, v, spec, sinks, result)
        return result


def _decode(
    block: BoundDecode,
    pool: TorchKVPool,
    layer: int,
    q: Tensor,
    spec: AttentionSpec,
    sinks: Tensor | None,
) -> Tensor:
    """(rows, heads, dim) for the block's rows."""
    past = pool.gather(layer, block.pages)
    past = past.view(block.rows, -1, *past.shape[1:])[:, block.first : block.last]
    keys, values = past.permute(2, 0, 3, 1, 4).unbind()
    if block.tokens is not None:
        q = q.index_select(0, block.tokens)
    return _attend(q.unsqueeze(2), keys, values, block.bias, False, spec, sinks).squeeze(2)


def _prefill(
    row: BoundPrefill,
    pool: TorchKVPool,
    layer: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    sinks: Tensor | None,
    result: Tensor,
) -> None:
    if row.pages is None:
        keys, values = k[row.start :], v[row.start :]
    else:
        keys, values = pool.gather(layer, row.pages).unbind(1)
    for piece, bias in row.pieces:
        where = slice(row.start + piece.query_first, row.start + piece.query_last)
        seen = slice(piece.key_first, piece.key_last)
        part = _attend(
            q[where].transpose(0, 1).unsqueeze(0),
            keys[seen].transpose(0, 1).unsqueeze(0),
            values[seen].transpose(0, 1).unsqueeze(0),
            bias,
            piece.causal,
            spec,
            sinks,
        )
        result[where] = part.squeeze(0).transpose(0, 1)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    causal: bool,
    spec: AttentionSpec,
    sinks: Tensor | None,
) -> Tensor:
    """q (B, heads, n, dim), k and v (B, kv_heads, L, dim) -> (B, heads, n, dim)."""
    if spec.soft_cap or sinks is not None:
        return _attend_by_definition(q, k, v, bias, causal, spec, sinks)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=bias,
        is_causal=causal,
        scale=spec.scale,
        enable_gqa=spec.heads != spec.kv_heads,
    )


def _attend_by_definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    causal: bool,
    spec: AttentionSpec,
    sinks: Tensor | None,
) -> Tensor:
    """The fused product has no place for a soft cap nor for sinks."""
    batch, heads, count, dim = q.shape
    grouped = q.reshape(batch, spec.kv_heads, -1, count, dim)
    logits = torch.matmul(grouped, k.unsqueeze(2).transpose(-1, -2)).float() * spec.scale
    if spec.soft_cap:
        logits = torch.tanh(logits / spec.soft_cap) * spec.soft_cap
    if causal:
        order = torch.arange(count, device=q.device)
        bias = _bias(order <= order.unsqueeze(1), torch.float32)
    if bias is not None:
        logits = logits + (bias if bias.dim() == 2 else bias.unsqueeze(1))
    keys = logits.shape[-1]
    if sinks is not None:
        column = sinks.float().view(1, spec.kv_heads, -1, 1, 1).expand(*logits.shape[:-1], 1)
        logits = torch.cat((logits, column), dim=-1)
    weights = torch.softmax(logits, dim=-1)[..., :keys].to(v.dtype)
    return torch.matmul(weights, v.unsqueeze(2)).reshape(batch, heads, count, dim)


def _pages(pages: I64, device: TorchDevice) -> Tensor | slice:
    """Neighbouring pages as a slice, so that they are read in place and not gathered."""
    first = int(pages[0])
    if np.array_equal(pages, np.arange(first, first + len(pages))):
        return slice(first, first + len(pages))
    return device.to_device(pages)


def _bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where seen, -inf elsewhere."""
    zero = torch.zeros((), dtype=dtype, device=seen.device)
    return zero.where(seen, -torch.inf)


def _band(piece: Piece, row: PrefillRow, device: TorchDevice, dtype: torch.dtype) -> Tensor:
    """(queries, keys): which keys of the piece each query sees."""
    if row.tree is not None:
        tree = row.tree[piece.query_first : piece.query_last, : piece.query_last]
        context = np.ones((len(tree), piece.key_count - tree.shape[1]), bool)
        return _bias(device.to_device(np.concatenate((context, tree), axis=1)), dtype)
    window = row.window
    queries = torch.arange(piece.query_count, device=device.torch_device).unsqueeze(1)
    distance = queries + piece.offset - torch.arange(piece.key_count, device=device.torch_device)
    seen = distance >= 0
    if window:
        seen &= distance < window
    return _bias(seen, dtype)
