"""Products with quantised matrices, and the lookup in them: a matrix is read once, in its few bits,
and widened in registers. Numbers and zeros are exact in every dtype; what 16 bits round is the
activations that are 16 bits already, and the result. Scales multiply float32 sums, group by group.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own spelling)
import triton
import triton.language as tl
from torch import Tensor

from . import packed_matrix
from .launch import ceil_div, rows_of
from .packed_matrix import PackedMatrix
from .tuning import Tile, Tuning, power_of_two

INT4 = tl.constexpr(packed_matrix.INT4)
FP8 = tl.constexpr(packed_matrix.FP8)
MXFP4 = tl.constexpr(packed_matrix.MXFP4)
PLAIN = tl.constexpr(packed_matrix.PLAIN)
ZEROS = tl.constexpr(packed_matrix.ZEROS)
MINIMUMS = tl.constexpr(packed_matrix.MINIMUMS)


@triton.jit
def widen(code, FORM: tl.constexpr):
    """The numbers of codes, float32. Fields of small floats are put where float16 has its own,
    which moves the exponent's bias: by 8 for e4m3, by 14 for e2m1."""
    if FORM == FP8:
        bits = ((code & 127).to(tl.uint16) << 7) | ((code & 128).to(tl.uint16) << 8)
        number = bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        number = tl.where((code & 127) == 127, float("nan"), number)
    elif FORM == MXFP4:
        bits = ((code & 7).to(tl.uint16) << 9) | ((code & 8).to(tl.uint16) << 12)
        number = bits.to(tl.float16, bitcast=True).to(tl.float32) * 16384.0
    else:
        number = code.to(tl.float32)
    return number


@triton.jit
def shifted(code, zero, FORM: tl.constexpr, SHIFT: tl.constexpr):
    """`zero` is used where there are zeros."""
    number = widen(code, FORM)
    if SHIFT == ZEROS:
        number -= zero
    elif SHIFT == PLAIN and FORM == INT4:
        number -= 8.0
    return number


@triton.jit
def packed_sums(
    x_at,
    live,
    data_at,
    scale_at,
    shift_at,
    inside,
    k,
    width,
    scale_stride,
    shift_stride,
    FORM: tl.constexpr,
    SHIFT: tl.constexpr,
    GROUP: tl.constexpr,
    PAIRED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of a product, float32. `x_at` (BLOCK_M,) is where rows begin; `data_at`, `scale_at`
    and `shift_at` (BLOCK_N,) where an output's numbers, scales and shifts do. `width` is a row of
    `data` in bytes, PAIRED where a byte has two numbers. BLOCK_K columns lie in one group, so that
    one scale per output multiplies their sum."""
    BYTES: tl.constexpr = BLOCK_K // 2 if PAIRED else BLOCK_K
    place = tl.arange(0, BYTES)
    depth = place
    if PAIRED:
        depth = place // 16 * 32 + place % 16
    x_at = x_at[:, None] + depth[None, :]
    data_at = data_at[None, :] + place[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in range(tl.cdiv(k, BLOCK_K)):
        start = block * BLOCK_K
        there = (block * BYTES + place < width)[:, None] & inside[None, :]
        code = tl.load(data_at + block * BYTES, mask=there, other=0)
        group = start // GROUP if GROUP else 0
        scale = tl.load(scale_at + group * scale_stride, mask=inside, other=0).to(tl.float32)
        if FORM == MXFP4:
            scale = tl.exp2(scale - 127.0)
        shift = scale
        if SHIFT != PLAIN:
            shift = tl.load(shift_at + group * shift_stride, mask=inside, other=0).to(tl.float32)
        deep = live[:, None] & (start + depth < k)[None, :]
        x = tl.load(x_at + start, mask=deep, other=0.0)
        low = code & 15 if PAIRED else code
        w = shifted(low, shift[None, :], FORM, SHIFT).to(x.dtype)
        part = tl.dot(x, w, input_precision="ieee")
        if PAIRED:
            deep = live[:, None] & (start + 16 + depth < k)[None, :]
            more = tl.load(x_at + start + 16, mask=deep, other=0.0)
            w = shifted(code >> 4, shift[None, :], FORM, SHIFT).to(x.dtype)
            part = tl.dot(more, w, part, input_precision="ieee")
        acc += part * scale[None, :]
        if SHIFT == MINIMUMS:
            total = tl.sum(x.to(tl.float32), axis=1)
            if PAIRED:
                total += tl.sum(more.to(tl.float32), axis=1)
            acc -= total[:, None] * shift[None, :]
    return acc


@triton.jit
def linear_kernel(
    x_ptr,
    data_ptr,
    scale_ptr,
    shift_ptr,
    bias_ptr,
    out_ptr,
    rows,
    n,
    k,
    x_stride,
    width,
    scale_stride,
    FORM: tl.constexpr,
    SHIFT: tl.constexpr,
    GROUP: tl.constexpr,
    SQUARES: tl.constexpr,
    PAIRED: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    live, inside = row < rows, column < n
    x_at = x_ptr + row.to(tl.int64) * x_stride
    data_at = data_ptr + column.to(tl.int64) * width
    scale_at = scale_ptr + column // SQUARES
    shift_at = scale_at
    if SHIFT != PLAIN:
        shift_at = shift_ptr + column
    acc = packed_sums(
        x_at, live, data_at, scale_at, shift_at, inside, k, width, scale_stride, n,
        FORM, SHIFT, GROUP, PAIRED, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if BIASED:
        acc += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    at = out_ptr + row.to(tl.int64)[:, None] * n + column[None, :]
    out = acc.to(out_ptr.dtype.element_ty)
    tl.store(at, out, mask=live[:, None] & inside[None, :])


@triton.jit
def lookup_kernel(
    ids_ptr,
    data_ptr,
    scale_ptr,
    shift_ptr,
    out_ptr,
    n,
    k,
    width,
    factor,
    FORM: tl.constexpr,
    SHIFT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(ids_ptr + row).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < k
    byte = column
    if FORM == INT4:
        byte = column // 32 * 16 + column % 16
    code = tl.load(data_ptr + token * width + byte, mask=inside, other=0)
    if FORM == INT4:
        code = tl.where(column % 32 < 16, code & 15, code >> 4)
    group = (column // GROUP if GROUP else column * 0).to(tl.int64)
    scale = tl.load(scale_ptr + group * n + token, mask=inside, other=0).to(tl.float32)
    shift = scale
    if SHIFT != PLAIN:
        shift = tl.load(shift_ptr + group * n + token, mask=inside, other=0).to(tl.float32)
    value = shifted(code, shift, FORM, SHIFT) * scale
    if SHIFT == MINIMUMS:
        value -= shift
    out = (value * factor).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * k + column, out, mask=inside)


def linear(
    tuning: Tuning, x: Tensor, weight: Tensor | PackedMatrix, bias: Tensor | None = None
) -> Tensor:
    """x (T, k) -> (T, n). A matrix in the dtype of x takes torch's own product."""
    if isinstance(weight, Tensor):
        return F.linear(x, weight, bias)
    x = rows_of(x if weight.order is None else x.index_select(-1, weight.order))
    (rows, k), n = x.shape, weight.shape[0]
    out = torch.empty((rows, n), dtype=x.dtype, device=x.device)
    tile = _tile(tuning, x)
    if not rows:
        return out
    linear_kernel[(ceil_div(rows, tile.block_m), ceil_div(n, tile.block_n))](
        x,
        weight.data,
        weight.scales,
        weight.shifts,
        bias,
        out,
        rows,
        n,
        k,
        x.stride(0),
        weight.data.shape[1],
        weight.scales.shape[1],
        FORM=weight.form,
        SHIFT=weight.shift,
        GROUP=weight.group,
        SQUARES=weight.squares,
        PAIRED=weight.paired,
        BIASED=bias is not None,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=weight.depth(tile.block_k),
        **tile.launch,
    )
    return out


def _tile(tuning: Tuning, x: Tensor) -> Tile:
    if x.dtype == torch.float32:
        return tuning.linear_float32
    return tuning.linear_narrow if len(x) <= tuning.linear_narrow.block_m else tuning.linear


def lookup(tuning: Tuning, ids: Tensor, table: PackedMatrix, scale: float = 1.0) -> Tensor:
    """ids (T,) -> rows of the table times `scale`, (T, k) in the dtype of the activations."""
    n, k = table.shape
    out = torch.empty((len(ids), k), dtype=table.dtype, device=ids.device)
    block = min(power_of_two(k), tuning.row_elements)
    if len(ids):
        lookup_kernel[(len(ids), ceil_div(k, block))](
            ids.contiguous(),
            table.data,
            table.scales,
            table.shifts,
            out,
            n,
            k,
            table.data.shape[1],
            scale,
            FORM=table.form,
            SHIFT=table.shift,
            GROUP=table.group,
            BLOCK=block,
            num_warps=tuning.warps(block),
        )
    return out
