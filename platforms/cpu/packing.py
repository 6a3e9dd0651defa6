"""Weights in the form that the native linear kernels read: panels of 16 outputs.

float32, bfloat16, float16   (panel, k, 16)
int8    signed bytes (panel, k/4, 16, 4); fp16 scales (panel, k/32, 16)
        with scales per 16 k (panel, k/16, 16) in the half-group form; minimums are possible
int4    nibbles (panel, k/8, 16, 4): byte b holds k = 8i + b low and k = 8i + 4 + b high; fp16
        scales as int8. The value is (q - 8) * scale, or q * scale - minimum with minimums.

k is padded to 32 in the quantised forms and n to 16, both with zeros.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own spelling)
from torch import Tensor

from ...common.checkpoint.quantised_rows import QuantisedRows
from ..torch_runtime.rounding import GROUP, round_int4, round_int8
from .native_library import WeightStruct

PANEL = 16
FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
INT8, INT4, INT8_HALF = 3, 4, 5


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A matrix (n, k) for the native kernels. Its tensors live as long as the structs."""

    format: int
    shape: tuple[int, int]
    data: Tensor
    scales: Tensor | None = None
    mins: Tensor | None = None
    order: Tensor | None = None  # place in the packed form -> k, where they are not the same
    structs: dict[int, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.data, self.scales, self.mins) if t is not None)

    @property
    def quantised(self) -> bool:
        return self.format in (INT8, INT4, INT8_HALF)

    def address(self, bias: Tensor | None) -> int:
        """Of a WeightStruct for this matrix with this bias; lives as long as the weight."""
        key = bias.data_ptr() if bias is not None else 0
        if key not in self.structs:
            wide = None if bias is None else bias.detach().float().contiguous()
            struct = WeightStruct(
                self.format,
                *self.shape,
                int(self.mins is not None),
                self.data.data_ptr(),
                self.scales.data_ptr() if self.scales is not None else None,
                self.mins.data_ptr() if self.mins is not None else None,
                wide.data_ptr() if wide is not None else None,
            )
            self.structs[key] = (struct, bias, wide)
        return ctypes.addressof(self.structs[key][0])


def pack_floats(weight: Tensor) -> PackedWeight:
    """weight (n, k) float32, bfloat16 or float16, kept in that dtype."""
    n, k = weight.shape
    whole = F.pad(weight, (0, 0, 0, -n % PANEL)) if n % PANEL else weight.contiguous()
    panels = whole.view(-1, PANEL, k)
    return PackedWeight(FLOATS[weight.dtype], (n, k), panels.transpose(1, 2).contiguous())


def quantise_int8(weight: Tensor) -> PackedWeight:
    return pack_int8(*round_int8(weight), weight.shape)


def quantise_int4(weight: Tensor) -> PackedWeight:
    return pack_int4(*round_int4(weight), weight.shape)


def pack_int8(q: Tensor, scale: Tensor, shape: Any, minimum: Tensor | None = None) -> PackedWeight:
    """q (n, groups, 32) whole numbers -128..127 of any dtype; scale (n, groups) or (n, 2 * groups),
    minimum (n, groups) -> packed."""
    n, k = shape
    groups = q.shape[1]
    # Groups may lie apart, as in a file's blocks: this is the only copy.
    fours = _pad_rows(q.to(torch.int8)).view(-1, PANEL, groups, GROUP // 4, 4)
    panels = fours.permute(0, 2, 3, 1, 4).contiguous().view(-1, groups * (GROUP // 4), PANEL, 4)
    kind = INT8 if scale.shape[1] == q.shape[1] else INT8_HALF
    mins = None if minimum is None else _by_panel(minimum)
    return PackedWeight(kind, (n, k), panels, _by_panel(scale), mins)


def pack_int4(q: Tensor, scale: Tensor, minimum: Tensor | None, shape: Any) -> PackedWeight:
    """q (n, groups, 32) whole numbers 0..15; scale and minimum (n, groups) -> packed."""
    n, k = shape
    fours = _pad_rows(q.to(torch.uint8)).view(-1, PANEL, q.shape[1] * (GROUP // 8), 2, 4)
    bytes_ = fours[..., 0, :] | (fours[..., 1, :] << 4)
    mins = None if minimum is None else _by_panel(minimum)
    return PackedWeight(INT4, (n, k), bytes_.transpose(1, 2).contiguous(), _by_panel(scale), mins)


def pack_stored(rows: QuantisedRows) -> PackedWeight:
    """A checkpoint's own numbers, rearranged; scales and minimums are rounded to fp16."""
    q, scale = torch.from_numpy(rows.q), torch.from_numpy(rows.scale)
    minimum = None if rows.minimum is None else torch.from_numpy(rows.minimum)
    if rows.bits == 4:
        packed = pack_int4(q, scale, minimum, rows.shape)
    else:
        packed = pack_int8(q, scale, rows.shape, minimum)
    if rows.order is None:
        return packed
    return replace(packed, order=torch.from_numpy(rows.order), structs={})


def dismantle(weight: PackedWeight) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(JSON facts, tensors by name), from which `restore` makes an equal weight."""
    values = {f.name: getattr(weight, f.name) for f in fields(weight)}
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    return {"format": weight.format, "shape": list(weight.shape)}, tensors


def restore(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> PackedWeight:
    n, k = facts["shape"]
    rest: dict[str, Any] = dict(tensors)
    return PackedWeight(facts["format"], (n, k), **rest)


def unpack(weight: PackedWeight) -> Tensor:
    """The values (n, k) float32 that the packed form stands for: the oracle of the kernels."""
    n, k = weight.shape
    if not weight.quantised:
        return weight.data.float().transpose(1, 2).reshape(-1, k)[:n]
    scale = _by_row(weight.scales)
    if weight.format == INT4:
        nibbles = torch.stack((weight.data & 15, weight.data >> 4), dim=-2)
        q = nibbles.transpose(1, 2).reshape(len(scale), -1).float()
        q = q - 8 if weight.mins is None else q
    else:
        q = weight.data.transpose(1, 2).reshape(len(scale), -1).float()
    values = q.view(*scale.shape, -1) * scale.unsqueeze(-1)
    if weight.mins is not None:
        values = values.view(len(scale), -1, GROUP) - _by_row(weight.mins).unsqueeze(-1)
    values = values.reshape(len(values), -1)[:n, :k].contiguous()
    return values if weight.order is None else values[:, weight.order.argsort()]


def _pad_rows(q: Tensor) -> Tensor:
    missing = -len(q) % PANEL
    return F.pad(q, (0, 0, 0, 0, 0, missing)) if missing else q


def _by_panel(values: Tensor) -> Tensor:
    """(n, groups) -> fp16 (panels, groups, 16)."""
    n, groups = values.shape
    padded = F.pad(values.half(), (0, 0, 0, -n % PANEL)).view(-1, PANEL, groups)
    return padded.transpose(1, 2).contiguous()


def _by_row(values: Tensor | None) -> Tensor:
    if values is None:
        raise ValueError("a quantised weight has scales")
    return values.float().transpose(1, 2).reshape(-1, values.shape[1])
