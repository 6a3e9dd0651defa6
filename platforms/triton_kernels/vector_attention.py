"""Latent attention, and attention over a window and compressed entries: new vectors are written,
then every query reads what it sees; few queries share their keys among parts, which are merged."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .launch import ceil_div, heads_of, rows_of
from .tuning import Tile, Tuning, power_of_two
from .vector_kernels import store_kernel, vector_attention_kernel, vector_merge_kernel

LEAST_DEPTH = 16
"""Of a product's inner dimension, on every matrix unit there is."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows of a step on the device, and the table of the tokens' pages."""

    table: Tensor
    starts: Tensor
    contexts: Tensor
    page_size: int

    @property
    def places(self) -> int:
        return power_of_two(len(self.contexts))


@dataclass(frozen=True, slots=True)
class _Seen:
    """What beside the tokens of a row its queries see; `window` 0: all tokens."""

    value_dim: int
    window: int = 0
    sinks: Tensor | None = None
    entries: Tensor | None = None
    table: Tensor | None = None
    ratio: int = 0
    selected: Tensor | None = None


def latent_attention(
    tuning: Tuning,
    q: Tensor,
    latents: Tensor,
    cache: Tensor,
    page_table: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    page_size: int,
    value_dim: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    rows = _Rows(page_table, query_start, context_lens, page_size)
    return _attend(tuning, q, latents, cache, rows, _Seen(value_dim), scale), cache


def compressed_attention(
    tuning: Tuning,
    q: Tensor,
    kv: Tensor,
    sinks: Tensor,
    window_cache: Tensor,
    window_table: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    page_size: int,
    window: int,
    scale: float,
    entries: Tensor | None = None,
    entry_table: Tensor | None = None,
    ratio: int = 0,
    selected: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    rows = _Rows(window_table, query_start, context_lens, page_size)
    seen = _Seen(q.shape[2], window, sinks, entries, entry_table, ratio, selected)
    return _attend(tuning, q, kv, window_cache, rows, seen, scale), window_cache


def _attend(
    tuning: Tuning, q: Tensor, new: Tensor, cache: Tensor, rows: _Rows, seen: _Seen, scale: float
) -> Tensor:
    tokens, heads, dim = q.shape
    out = torch.empty((tokens, heads, seen.value_dim), dtype=q.dtype, device=q.device)
    if not tokens:
        return out
    _store(tuning, rows_of(new), cache, rows)
    few = tokens <= len(rows.contexts)
    tile = _fitted(tuning.vectors if few else tuning.vectors_wide, q, seen.value_dim, tuning)
    splits = tuning.splits if few else 1
    room = tokens * heads * splits if splits > 1 else 1
    partial = torch.empty((room, seen.value_dim), dtype=torch.float32, device=q.device)
    stats = torch.empty((room, 2), dtype=torch.float32, device=q.device)
    sinks = stats if seen.sinks is None else seen.sinks
    entry_table = rows.table if seen.table is None else seen.table
    selected = None if seen.selected is None else seen.selected.contiguous()
    shared = {
        "HEADS": heads,
        "VALUE": seen.value_dim,
        "WINDOW": seen.window,
        "RATIO": 0 if seen.entries is None else seen.ratio,
        "SELECTED": 0 if selected is None else selected.shape[1],
        "SINKS": seen.sinks is not None,
        "SPLITS": splits,
        "LEAST": tuning.least_blocks,
        "ROWS": rows.places,
        "BLOCK_N": tile.block_n,
        "BLOCK_V": _columns(seen.value_dim),
    }
    q = heads_of(q)
    vector_attention_kernel[(tokens, ceil_div(heads, tile.block_m), splits)](
        q,
        cache,
        cache if seen.entries is None else seen.entries,
        out,
        partial,
        stats,
        sinks,
        rows.table,
        entry_table,
        rows.table if selected is None else selected,
        rows.starts,
        rows.contexts,
        len(rows.contexts),
        scale,
        *q.stride()[:2],
        rows.table.stride(0),
        entry_table.stride(0),
        DIM=dim,
        PAGE_SIZE=rows.page_size,
        BLOCK_M=tile.block_m,
        BLOCK_R=_columns(dim - seen.value_dim),
        **shared,
        **tile.launch,
    )
    if splits > 1:
        vector_merge_kernel[(tokens, heads)](
            out,
            partial,
            stats,
            sinks,
            rows.starts,
            rows.contexts,
            len(rows.contexts),
            **shared,
            num_warps=tuning.warps(splits * shared["BLOCK_V"]),
        )
    return out


def _store(tuning: Tuning, new: Tensor, cache: Tensor, rows: _Rows) -> None:
    block = power_of_two(new.shape[1])
    store_kernel[(len(new),)](
        new,
        cache,
        rows.table,
        rows.starts,
        rows.contexts,
        len(rows.contexts),
        new.stride(0),
        rows.table.stride(0),
        PAGE_SIZE=rows.page_size,
        DIM=new.shape[1],
        ROWS=rows.places,
        BLOCK=block,
        num_warps=tuning.warps(block),
    )


def _columns(dim: int) -> int:
    return max(LEAST_DEPTH, power_of_two(dim))


def _fitted(tile: Tile, q: Tensor, value_dim: int, tuning: Tuning) -> Tile:
    """No more heads than there are; in float32 the smallest blocks, for its exact products leave
    the matrix units of most parts."""
    most = max(LEAST_DEPTH, power_of_two(q.shape[1]))
    block_n = tile.block_n if q.element_size() < 4 else LEAST_DEPTH
    block_m = min(tile.block_m, most) if q.element_size() < 4 else LEAST_DEPTH
    return Tile(block_m, block_n, tile.warps, tile.stages)
