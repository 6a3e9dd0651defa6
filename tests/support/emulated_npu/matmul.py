"""Products of the library. Pages of op-plugin, by op: `torch_npu-npu_dynamic_quant.md`,
`-npu_quant_matmul.md` (table 2: int8 with a scale a row), `-npu_weight_quant_batchmatmul.md`,
`-npu_convert_weight_to_int4pack.md`, `-npu_grouped_matmul.md` (unquantised, the scene of single
tensors grouped along rows). The order of numbers inside a packed int32 is not documented, so the
emulator keeps one of its own: code that assumes another finds wrong numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import FLOATS, HALVES, NPUError, contiguous, dtype_of, need, not_emulated

WIDEST, INNER_LIMIT, MOST_GROUPS = 65535, 65536, 1024
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of a number's four bits among the eight


def npu_dynamic_quant(
    input: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor]:
    op = "npu_dynamic_quant"
    not_emulated(
        op, smooth_scales=smooth_scales, group_index=group_index, dst_type=dst_type,
        dst_type_max=dst_type_max,
    )  # fmt: skip
    need(quant_mode == "pertoken", op, f"quant_mode {quant_mode} is not emulated")
    dtype_of(op, "input", input, HALVES)
    need(input.dim() > 1, op, f"input has {input.dim()} axes, needs more than 1")
    need(input.numel() > 0, op, "an empty input is not documented")
    scale = input.float().abs().amax(-1) / 127
    need(bool((scale > 0).all()), op, "of a row of zeros the page says nothing")
    return (input.float() / scale.unsqueeze(-1)).round().to(torch.int8), scale


def npu_quant_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    *,
    offset: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    output_dtype: torch.dtype | None = None,
    **unused: Any,
) -> Tensor:
    op = "npu_quant_matmul"
    not_emulated(op, offset=offset, **unused)
    need(x1.dtype == x2.dtype == torch.int8, op, f"x1 and x2 are int8, not {x1.dtype}, {x2.dtype}")
    need(x1.dim() == x2.dim() == 2, op, "only two axes are emulated")
    need(min(x1.numel(), x2.numel(), scale.numel()) > 0, op, "x1, x2 and scale are not empty")
    need(max(x1.shape[-1], x2.shape[-1]) <= WIDEST, op, f"last axes are up to {WIDEST}")
    need(x1.shape[1] == x2.shape[0], op, f"x1 {tuple(x1.shape)} by x2 {tuple(x2.shape)}")
    contiguous(op, x1=x1, scale=scale, pertoken_scale=pertoken_scale, bias=bias)
    _dense_or_transposed(op, "x2", x2)
    if pertoken_scale is None:
        raise NPUError(f"{op}: without pertoken_scale it is not emulated")
    outputs = x2.shape[1]
    scales = (torch.float32,) if output_dtype == torch.float16 else (torch.float32, torch.bfloat16)
    need(output_dtype in HALVES, op, f"output {output_dtype} is not emulated")
    dtype_of(op, "scale", scale, scales)
    need(tuple(scale.shape) in ((1,), (outputs,)), op, f"scale is (1,) or ({outputs},)")
    dtype_of(op, "pertoken_scale", pertoken_scale, (torch.float32,))
    need(tuple(pertoken_scale.shape) == (len(x1),), op, f"pertoken_scale is ({len(x1)},)")
    result = (x1.double() @ x2.double()).float() * scale.float() * pertoken_scale.unsqueeze(1)
    if bias is not None:
        dtype_of(op, "bias", bias, (torch.bfloat16, torch.float32))
        need(tuple(bias.shape) == (outputs,), op, f"bias is ({outputs},), not {tuple(bias.shape)}")
        result = result + bias.float()
    return result.to(output_dtype)


def npu_convert_weight_to_int4pack(weight: Tensor, inner_k_tiles: int = 0) -> Tensor:
    op = "npu_convert_weight_to_int4pack"
    not_emulated(op, inner_k_tiles=inner_k_tiles)
    dtype_of(op, "weight", weight, (torch.int32,))
    contiguous(op, weight=weight)
    need(weight.dim() == 2, op, f"weight has {weight.dim()} axes, not 2")
    need(weight.shape[1] % 8 == 0, op, f"the last axis is a multiple of 8, not {weight.shape[1]}")
    need(bool(((weight >= -8) & (weight <= 7)).all()), op, "numbers are -8 to 7")
    parts = (weight.long() & 15).unflatten(1, (-1, 8))
    packed = sum(parts[..., i] << (4 * place) for i, place in enumerate(PLACES))
    return torch.as_tensor(packed).to(torch.int32)


def _unpacked(packed: Tensor) -> Tensor:
    wide = packed.long()
    parts = torch.stack([(wide >> (4 * place)) & 15 for place in PLACES], -1)
    return torch.where(parts > 7, parts - 16, parts).flatten(1)


def npu_weight_quant_batchmatmul(
    x: Tensor,
    weight: Tensor,
    antiquant_scale: Tensor,
    antiquant_offset: Tensor | None = None,
    quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None,
    bias: Tensor | None = None,
    antiquant_group_size: int = 0,
    inner_precise: int = 0,
    weight_dtype: int | None = None,
) -> Tensor:
    op = "npu_weight_quant_batchmatmul"
    not_emulated(
        op, quant_scale=quant_scale, quant_offset=quant_offset, inner_precise=inner_precise,
        weight_dtype=weight_dtype,
    )  # fmt: skip
    dtype_of(op, "x", x, HALVES)
    dtype_of(op, "weight", weight, (torch.int8, torch.int32))
    need(x.dim() == weight.dim() == 2, op, "x and weight have two axes")
    need(min(x.numel(), weight.numel()) > 0, op, "empty tensors are not taken")
    _dense_or_transposed(op, "x", x)
    _dense_or_transposed(op, "weight", weight)
    if weight.dtype == torch.int32:
        need(weight.is_contiguous(), op, "four bits, transposed, are not emulated")
        weight = _unpacked(weight)
    inner, outputs = weight.shape
    need(x.shape[1] == inner, op, f"x {tuple(x.shape)} by weight {tuple(weight.shape)}")
    need(max(inner, outputs) <= WIDEST, op, f"K and N are up to {WIDEST}")
    need(antiquant_scale.dtype == x.dtype, op, f"scale is {antiquant_scale.dtype}, x {x.dtype}")
    wide = _widened(op, weight, antiquant_scale, antiquant_offset, antiquant_group_size)
    result = x.float() @ wide
    if bias is not None:
        wanted = torch.float32 if x.dtype == torch.bfloat16 else torch.float16
        dtype_of(op, "bias", bias, (wanted,))
        contiguous(op, bias=bias)
        shapes = ((outputs,), (1, outputs))
        need(tuple(bias.shape) in shapes, op, f"bias is {shapes}, not {tuple(bias.shape)}")
        result = result + bias.float()
    return result.to(x.dtype)


def _widened(op: str, weight: Tensor, scale: Tensor, offset: Tensor | None, group: int) -> Tensor:
    inner, outputs = weight.shape
    shapes: tuple[tuple[int, ...], ...] = ((1,), (1, 1), (outputs,), (1, outputs))
    if group:
        fits = group % 32 == 0 and 32 <= group <= inner - 1
        need(fits, op, f"a group is a multiple of 32 from 32 to K - 1 = {inner - 1}, not {group}")
        shapes = ((-(-inner // group), outputs),)
    need(tuple(scale.shape) in shapes, op, f"scale {tuple(scale.shape)} is none of {shapes}")
    parts = [scale] if offset is None else [scale, offset]
    if offset is not None:
        need(offset.dtype == scale.dtype, op, f"offset is {offset.dtype}, scale {scale.dtype}")
        need(offset.shape == scale.shape, op, "offset and scale differ in shape")
    if group:
        parts = [part.repeat_interleave(group, 0)[:inner] for part in parts]
    added = weight.float() if offset is None else weight.float() + parts[1].float()
    return added * parts[0].float()


def npu_grouped_matmul(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    *,
    bias: Sequence[Tensor] | None = None,
    group_list: Tensor | None = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    **unused: Any,
) -> list[Tensor]:
    op = "npu_grouped_matmul"
    not_emulated(op, **unused)
    need(len(x) == len(weight) == 1, op, "only single tensors are emulated")
    need(split_item in (2, 3), op, f"split_item {split_item}: one tensor comes out with 2 or 3")
    need((group_type, group_list_type) == (0, 0), op, "only running counts of rows are emulated")
    (rows,), (stack,) = x, weight
    dtype_of(op, "x", rows, FLOATS)
    need(stack.dtype == rows.dtype, op, f"weight is {stack.dtype}, x is {rows.dtype}")
    need(rows.dim() == 2 and stack.dim() == 3, op, "x has two axes, weight three")
    need(rows.numel() > 0, op, "an empty x is not documented")
    contiguous(op, x=rows)
    _dense_or_transposed(op, "weight", stack)
    need(rows.shape[1] == stack.shape[1], op, f"x {tuple(rows.shape)}, {tuple(stack.shape)}")
    need(max(rows.shape[1], *stack.shape[1:]) < INNER_LIMIT, op, f"sides are below {INNER_LIMIT}")
    need(bias is None, op, "bias has one axis for each tensor of weight; here it would need two")
    _check_ends(op, group_list, len(rows), len(stack))
    begin, parts = 0, []
    for matrix, end in zip(stack, [] if group_list is None else group_list.tolist(), strict=True):
        parts.append(rows[begin:end].float() @ matrix.float())
        begin = end
    return [torch.cat(parts).to(rows.dtype)]


def _check_ends(op: str, ends: Tensor | None, rows: int, groups: int) -> None:
    given = ends is not None and ends.dtype == torch.int64 and tuple(ends.shape) == (groups,)
    need(given, op, f"group_list is int64 of ({groups},)")
    need(groups <= MOST_GROUPS, op, f"up to {MOST_GROUPS} groups")
    listed = [] if ends is None else ends.tolist()
    need(listed == sorted(listed) and listed[0] >= 0, op, "group_list does not fall")
    need(listed[-1] == rows, op, f"group_list ends at {listed[-1]}, x has {rows} rows")


def _dense_or_transposed(op: str, name: str, tensor: Tensor) -> None:
    fits = tensor.is_contiguous() or tensor.transpose(-1, -2).is_contiguous()
    need(fits, op, f"{name} is neither contiguous nor a transposed tensor that is")
