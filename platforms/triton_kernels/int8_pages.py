"""Writing keys and values in eight bits: a row's numbers as whole steps of a 127th of its largest
magnitude, then that step, a float32, behind them. Pages cross to other platforms in this form."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .paging import launch_write
from .tuning import Tuning

STEP_BYTES = 4
"""Of a row, behind its codes. Rows are read as float32 too: dims are multiples of four."""


@triton.jit
def write_row(
    x_ptr,
    codes_ptr,
    steps_ptr,
    target,
    inside,
    there,
    DIM: tl.constexpr,
):
    """Rows (HEADS, COLUMNS) of one token. `target` (HEADS, 1): bytes from where the storage begins.
    A row that holds a NaN has the step NaN."""
    column = tl.arange(0, inside.shape[1])[None, :]
    x = tl.load(x_ptr, mask=inside, other=0.0).to(tl.float32)
    step = tl.max(tl.abs(x), axis=1) / 127.0
    broken = tl.max((x != x).to(tl.int32), axis=1) > 0
    scaled = x / tl.where(step > 0.0, step, 1.0)[:, None]
    # Adding and taking away 3 * 2^22 rounds to whole numbers, ties to even.
    codes = (scaled + 12582912.0) - 12582912.0
    codes = tl.where(codes == codes, codes, 0.0).to(tl.int8)
    tl.store(codes_ptr + target + column, codes, mask=inside)
    step = tl.where(broken, float("nan"), step)
    tl.store(steps_ptr + target // 4 + DIM // 4, step[:, None], mask=there)


@triton.jit
def write_int8_kernel(
    k_ptr,
    v_ptr,
    slots_ptr,
    keys_ptr,
    values_ptr,
    key_steps_ptr,
    value_steps_ptr,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    page_stride,
    slot_stride,
    head_stride,
    heads,
    PAGE_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One token's keys and values. Both storages have the same strides, in bytes."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    there = head < heads
    inside = there & (column < DIM)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    at = slot // PAGE_SIZE * page_stride + slot % PAGE_SIZE * slot_stride + head * head_stride
    k_at = k_ptr + token * k_token_stride + head * k_head_stride + column
    v_at = v_ptr + token * v_token_stride + head * v_head_stride + column
    write_row(k_at, keys_ptr, key_steps_ptr, at, inside, there, DIM)
    write_row(v_at, values_ptr, value_steps_ptr, at, inside, there, DIM)


def write_int8_pages(
    tuning: Tuning, keys: Tensor, values: Tensor, slots: Tensor, k: Tensor, v: Tensor
) -> None:
    """keys, values (pages, token, heads, dim + 4) int8 of equal strides; slots (T,) of any
    integers; k, v (T, heads, dim)."""
    storages = (keys, values, keys.view(torch.float32), values.view(torch.float32))
    strides, size = keys.stride()[:3], keys.shape[1]
    launch_write(write_int8_kernel, tuning, storages, strides, size, slots, k, v)
