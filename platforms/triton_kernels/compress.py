"""Compressing tokens into cache entries. A step with no more tokens than rows is one launch, which
pools only where a window ends; in others entries come first and the ring after them."""

from __future__ import annotations

from torch import Tensor

from .compress_kernels import compress_kernel
from .launch import rows_of
from .tuning import Tuning, power_of_two


def compress_norm_rope_store(
    tuning: Tuning,
    projected: Tensor,
    state: Tensor,
    slots: Tensor,
    ape: Tensor,
    weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    page_table: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    page_size: int,
) -> tuple[Tensor, Tensor]:
    """Slots of `state` may lie apart; one slot is one piece of memory."""
    projected, rows, dim = rows_of(projected), len(slots), len(weight)
    (ratio, width), rotary = ape.shape, 2 * cos.shape[1]
    columns = power_of_two(max(1, dim - rotary))
    few = len(projected) <= rows
    for makes, appends in ((True, True),) if few else ((True, False), (False, True)):
        if not len(projected):
            break
        compress_kernel[(rows if few else len(projected),)](
            projected,
            state,
            ape,
            weight,
            cos.contiguous(),
            sin.contiguous(),
            cache,
            slots,
            page_table,
            query_start,
            context_lens,
            rows,
            eps,
            projected.stride(0),
            state.stride(0),
            page_table.stride(0),
            MAKES=makes,
            APPENDS=appends,
            DIM=dim,
            ROTARY=rotary,
            RATIO=ratio,
            PARTS=width // dim,
            RING=state.shape[1],
            PAGE_SIZE=page_size,
            ROWS=power_of_two(rows),
            BLOCK_P=min(tuning.pool.block_m, power_of_two(ratio * width // dim)),
            BLOCK_C=columns,
            BLOCK_R=power_of_two(rotary // 2),
            **tuning.pool.launch,
        )
    return state, cache
