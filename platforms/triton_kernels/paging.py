"""Writing new keys and values, copying pages, and the fingerprint of pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...common.ops.page_digest import SEED, STRIDE
from .launch import ceil_div, heads_of
from .tuning import Tuning, power_of_two

DIGEST_BLOCK = 1024


@triton.jit
def write_kernel(
    k_ptr,
    v_ptr,
    slots_ptr,
    keys_ptr,
    values_ptr,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    page_stride,
    slot_stride,
    head_stride,
    dim_stride,
    heads,
    PAGE_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One token's keys and values. Both storages have the same strides."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (head < heads) & (column < DIM)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    at = slot // PAGE_SIZE * page_stride + slot % PAGE_SIZE * slot_stride
    target = at + head * head_stride + column * dim_stride
    k = tl.load(k_ptr + token * k_token_stride + head * k_head_stride + column, mask=inside)
    v = tl.load(v_ptr + token * v_token_stride + head * v_head_stride + column, mask=inside)
    tl.store(keys_ptr + target, k, mask=inside)
    tl.store(values_ptr + target, v, mask=inside)


@triton.jit
def page_move_kernel(
    source_ptr,
    target_ptr,
    from_ptr,
    to_ptr,
    elements,
    source_layer_stride,
    target_layer_stride,
    LISTED_SOURCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of one page of one layer. The side that is not listed holds the n pages in order."""
    index = tl.program_id(0)
    layer = tl.program_id(2).to(tl.int64)
    source = index.to(tl.int64)
    target = index.to(tl.int64)
    if LISTED_SOURCE:
        source = tl.load(from_ptr + index).to(tl.int64)
    else:
        target = tl.load(to_ptr + index).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < elements
    value = tl.load(
        source_ptr + layer * source_layer_stride + source * elements + column, mask=inside
    )
    tl.store(
        target_ptr + layer * target_layer_stride + target * elements + column, value, mask=inside
    )


@triton.jit
def mix32(h):
    """MurmurHash3's finaliser, as in `common/ops/sample.py`; h uint32."""
    h = (h ^ (h >> 16)) * tl.full((), 0x85EBCA6B, tl.uint32)
    h = (h ^ (h >> 13)) * tl.full((), 0xC2B2AE35, tl.uint32)
    return h ^ (h >> 16)


@triton.jit
def page_digest_kernel(
    pool_ptr,
    pages_ptr,
    out_ptr,
    count,
    heads,
    page_stride,
    token_stride,
    head_stride,
    dim_stride,
    SEED: tl.constexpr,
    STRIDE: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One page per program; elements are integers of WIDTH bits."""
    page = tl.load(pages_ptr + tl.program_id(0)).to(tl.int64)
    first = tl.zeros((BLOCK,), tl.uint32)
    second = tl.zeros((BLOCK,), tl.uint32)
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        token, head, column = place // (heads * DIM), place // DIM % heads, place % DIM
        at = page * page_stride + token * token_stride + head * head_stride + column * dim_stride
        inside = place < count
        bits = tl.load(pool_ptr + at, mask=inside, other=0).to(tl.int32).to(tl.uint32)
        if WIDTH < 32:
            bits &= (1 << WIDTH) - 1
        k = mix32(place.to(tl.uint32) * tl.full((), STRIDE, tl.uint32) + SEED)
        a = mix32(k ^ bits)
        first += tl.where(inside, a, 0)
        second += tl.where(inside, mix32(a + k), 0)
    at = out_ptr + 2 * tl.program_id(0)
    tl.store(at, tl.sum(first, axis=0).to(tl.uint32).to(tl.int64))
    tl.store(at + 1, tl.sum(second, axis=0).to(tl.uint32).to(tl.int64))


def launch_write(
    kernel: Any,
    tuning: Tuning,
    storages: Sequence[Tensor],
    strides: Sequence[int],
    page_size: int,
    slots: Tensor,
    k: Tensor,
    v: Tensor,
) -> None:
    """A kernel that writes tokens k, v (T, heads, dim) at `slots`, a block of heads a program."""
    k, v = heads_of(k), heads_of(v)
    tokens, heads, dim = k.shape
    columns = power_of_two(dim)
    block = min(power_of_two(heads), max(1, tuning.row_elements // columns))
    if tokens:
        kernel[(tokens, ceil_div(heads, block))](
            k,
            v,
            slots,
            *storages,
            *k.stride()[:2],
            *v.stride()[:2],
            *strides,
            heads,
            PAGE_SIZE=page_size,
            DIM=dim,
            HEADS=block,
            COLUMNS=columns,
            num_warps=tuning.warps(block * columns),
        )


def write_pages(
    tuning: Tuning, keys: Tensor, values: Tensor, slots: Tensor, k: Tensor, v: Tensor
) -> None:
    """keys, values (pages, token, heads, dim) of equal strides; slots (T,) of any integers; k, v
    (T, heads, dim)."""
    size = keys.shape[1]
    launch_write(write_kernel, tuning, (keys, values), keys.stride(), size, slots, k, v)


def kv_write(
    tuning: Tuning, keys: Tensor, values: Tensor, slots: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    if keys.stride() == values.stride():
        write_pages(tuning, keys.unsqueeze(1), values.unsqueeze(1), slots, k, v)
    else:
        write_pages(tuning, keys.unsqueeze(1), keys.unsqueeze(1), slots, k, k)
        write_pages(tuning, values.unsqueeze(1), values.unsqueeze(1), slots, v, v)
    return keys, values


def page_copy(tuning: Tuning, pool: Tensor, sources: Tensor, targets: Tensor) -> Tensor:
    """Through a buffer, so that every source is read before any target is written."""
    pages = pool.view(pool.shape[0], pool.shape[1], -1)
    layers, _, elements = pages.shape
    count = len(sources)
    if not count:
        return pool
    held = torch.empty((layers, count, elements), dtype=pool.dtype, device=pool.device)
    block = min(power_of_two(elements), 2 * tuning.row_elements)
    grid = (count, ceil_div(elements, block), layers)
    for listed, source, target in ((True, pages, held), (False, held, pages)):
        page_move_kernel[grid](
            source,
            target,
            sources,
            targets,
            elements,
            source.stride(0),
            target.stride(0),
            LISTED_SOURCE=listed,
            BLOCK=block,
            num_warps=tuning.warps(block),
        )
    return pool


_BITS = {8: torch.int8, 16: torch.int16, 32: torch.int32}


def page_digest(tuning: Tuning, pool: Tensor, pages: Tensor) -> Tensor:
    """int64, as the generic kernel: torch has little of uint32."""
    out = torch.empty((len(pages), 2), dtype=torch.int64, device=pool.device)
    width = 8 * pool.element_size()
    if len(pages):
        page_digest_kernel[(len(pages),)](
            pool.view(_BITS[width]),
            pages,
            out,
            pool[0].numel(),
            pool.shape[2],
            *pool.stride(),
            SEED=SEED,
            STRIDE=STRIDE,
            DIM=pool.shape[3],
            WIDTH=width,
            BLOCK=DIGEST_BLOCK,
            num_warps=tuning.warps(DIGEST_BLOCK),
        )
    return out
