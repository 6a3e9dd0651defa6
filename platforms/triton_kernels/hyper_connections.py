"""Hyper-connections: `mhc_post`, `mhc_pre`, both with the norm between sub-layers, and `mhc_head`.

Few tokens share the products of one token among programs; many tokens (more than the table's
`mhc_few`) are taken 16 at a time, so that the matrix is read once for all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .hyper_kernels import finish_kernel, streams_kernel
from .launch import ceil_div, rows_of
from .tuning import Tuning, power_of_two


def mhc_post(tuning: Tuning, made: Tensor, streams: Tensor, post: Tensor, mixing: Tensor) -> Tensor:
    return _streams(tuning, streams, None, (made, post, mixing))[0]


def mhc_pre(
    tuning: Tuning,
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    iterations: int,
    eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    streams = streams.contiguous()
    sums = _streams(tuning, streams, fn)[1:]
    return _finish(tuning, streams, sums, base, scale, None, iterations, eps, norm_eps)


def mhc_post_pre(
    tuning: Tuning,
    made: Tensor,
    streams: Tensor,
    post: Tensor,
    mixing: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm_weight: Tensor,
    iterations: int,
    eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    new, *sums = _streams(tuning, streams, fn, (made, post, mixing))
    found = _finish(tuning, new, sums, base, scale, norm_weight, iterations, eps, norm_eps)
    return new, *found


def mhc_head(
    tuning: Tuning,
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    eps: float,
    norm_eps: float,
) -> Tensor:
    streams = streams.contiguous()
    sums = _streams(tuning, streams, fn)[1:]
    return _finish(tuning, streams, sums, base, scale, None, 0, eps, norm_eps, head=True)[0]


def _streams(
    tuning: Tuning,
    streams: Tensor,
    fn: Tensor | None,
    finished: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`finished`: made, post and mixing of the sub-layer before -> new streams, which lie in memory
    of their own, and sums by slice: (splits, T, outputs) and (splits, T)."""
    streams = streams.contiguous()
    tokens, count, width = streams.shape
    outputs = 0 if fn is None else len(fn)
    new = streams if finished is None else torch.empty_like(streams)
    tile = tuning.mhc if tokens <= tuning.mhc_few else tuning.mhc_many
    slices = min(tuning.mhc_slices, power_of_two(ceil_div(width, tile.block_k)))
    slice_width = tile.block_k * ceil_div(width, tile.block_k * slices)
    sums = streams.new_empty((slices, tokens, outputs), dtype=torch.float32)
    squares = streams.new_empty((slices, tokens), dtype=torch.float32)
    made, post, mixing = finished or (streams.flatten(1), squares, squares)
    made = rows_of(made)
    grid = (ceil_div(tokens, tile.block_m), max(1, ceil_div(outputs, tile.block_n)), slices)
    if tokens:
        streams_kernel[grid](
            made,
            streams,
            post.contiguous(),
            mixing.contiguous(),
            squares if fn is None else fn,
            new,
            sums,
            squares,
            tokens,
            width,
            made.stride(0),
            slice_width,
            POST=finished is not None,
            OUTPUTS=outputs,
            N=count,
            TOKENS=tile.block_m,
            BLOCK_O=tile.block_n,
            BLOCK=tile.block_k,
            **tile.launch,
        )
    return new, sums, squares


def _finish(
    tuning: Tuning,
    streams: Tensor,
    sums: list[Tensor] | tuple[Tensor, ...],
    base: Tensor,
    scale: Tensor,
    norm_weight: Tensor | None,
    iterations: int,
    eps: float,
    norm_eps: float,
    head: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sub-layer's input, its post and its mixing; for the head the input alone has values."""
    tokens, count, width = streams.shape
    out = streams.new_empty((tokens, width))
    post = streams.new_empty((tokens, count), dtype=torch.float32)
    mixing = streams.new_empty((tokens, count, count), dtype=torch.float32)
    columns = power_of_two(width)
    if tokens:
        finish_kernel[(tokens,)](
            streams,
            *sums,
            base,
            scale,
            base if norm_weight is None else norm_weight,
            out,
            post,
            mixing,
            tokens,
            width,
            iterations,
            eps,
            norm_eps,
            HEAD=head,
            NORM=norm_weight is not None,
            N=count,
            SPLITS=len(sums[0]),
            COLUMNS=columns,
            num_warps=tuning.warps(columns),
        )
    return out, post, mixing
