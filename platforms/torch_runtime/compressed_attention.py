"""Generic kernels that read compressed entries: the indexer, and attention over a window and
entries. Steps in which every row has one token run all rows at once, as wide as the page tables.
Other steps go row by row, in blocks of queries that share their keys, with the rows' lengths read
on the host."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

QUERY_BLOCK = 64
"""Queries of a long row that share one product."""
SCORES = 1 << 24
"""Scores that are held at once, of all heads, queries and keys."""
SPARSE = 4
"""From so many times the selected entries on, a query gathers its own instead of sharing all."""


def index_topk(
    q: Tensor,
    weights: Tensor,
    cache: Tensor,
    page_table: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    page_size: int,
    ratio: int,
    top_k: int,
) -> Tensor:
    if len(q) == len(page_table):
        keys = _entries(cache, page_table, page_size, ratio)
        chosen = _best(q.unsqueeze(1), weights.unsqueeze(1), keys, context_lens[:, None], ratio)
        return _padded(chosen[:, 0], top_k)
    result = torch.full((len(q), top_k), -1, dtype=torch.int64, device=q.device)
    for block in _blocks(query_start, context_lens, q.shape[1], ratio):
        last, width = block.last, -(-block.last // page_size)
        table = page_table[block.row : block.row + 1, :width]
        keys = _entries(cache, table, page_size, ratio)[:, : last // ratio]
        position = torch.arange(block.first, last, device=q.device).unsqueeze(0)
        part = _best(q[None, block.tokens], weights[None, block.tokens], keys, position, ratio)
        result[block.tokens] = _padded(part[0], top_k)
    return result


def _best(q: Tensor, weights: Tensor, keys: Tensor, position: Tensor, ratio: int) -> Tensor:
    """q (R, n, H, D), weights (R, n, H), keys (R, W, D), position (R, n) -> (R, n, W) entries, best
    first, -1 for those that the query does not see."""
    rows, count, heads, dim = q.shape
    products = q.reshape(rows, count * heads, dim).float() @ keys.float().mT
    products = products.relu_().view(rows, count, heads, keys.shape[1])
    scores = (weights.float().unsqueeze(-2) @ products).squeeze(-2)
    entry = torch.arange(keys.shape[1], device=q.device)
    hidden = entry >= ((position + 1) // ratio).unsqueeze(-1)
    scores = scores.masked_fill(hidden, -torch.inf)
    order = torch.sort(scores, dim=-1, descending=True, stable=True)[1]
    return order.masked_fill(hidden.gather(-1, order), -1)


def _padded(order: Tensor, top_k: int) -> Tensor:
    """(n, W) best first, then -1 -> (n, top_k) ascending, then -1."""
    missing = max(0, top_k - order.shape[1])
    chosen = torch.nn.functional.pad(order[:, :top_k], (0, missing), value=-1)
    last = torch.iinfo(chosen.dtype).max
    chosen = chosen.masked_fill(chosen < 0, last).sort(dim=-1)[0]
    return chosen.masked_fill(chosen == last, -1)


def compressed_attention(
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
    token = torch.arange(len(q), device=q.device, dtype=query_start.dtype)
    row = torch.searchsorted(query_start[1:].contiguous(), token, right=True)
    position = (context_lens[row] + token - query_start[row]).long()
    page = window_table[row, position // page_size].long()
    window_cache.index_copy_(0, page * page_size + position % page_size, kv)
    cache = _Cache(window_cache, window_table, page_size, window, entries, entry_table, ratio)
    if len(q) == len(window_table):
        result = cache.decode(q, position, sinks, selected, scale)
        return result, window_cache
    result = torch.empty_like(q)
    for block in _blocks(query_start, context_lens, q.shape[1], ratio):
        where, some = block.tokens, None if selected is None else selected[block.tokens]
        if some is not None and block.last // ratio > SPARSE * some.shape[1]:
            own = cache.of_row(block.row, block.count)
            result[where] = own.decode(q[where], position[where], sinks, some, scale)
        else:
            result[where] = cache.prefill(q[where], block, sinks, some, scale)
    return result, window_cache


@dataclass(frozen=True, slots=True)
class _Block:
    """Neighbouring queries of one row."""

    row: int
    tokens: slice
    first: int  # position of the first query

    @property
    def count(self) -> int:
        return int(self.tokens.stop - self.tokens.start)

    @property
    def last(self) -> int:
        """Tokens of the row up to the last query."""
        return self.first + self.count


def _blocks(query_start: Tensor, context_lens: Tensor, heads: int, ratio: int) -> Iterator[_Block]:
    starts, contexts = query_start.tolist(), context_lens.tolist()
    for row, context in enumerate(contexts):
        end = starts[row + 1]
        entries = (context + end - starts[row]) // ratio if ratio else 0
        size = max(1, min(QUERY_BLOCK, SCORES // (heads * max(1, entries))))
        for first in range(starts[row], end, size):
            tokens = slice(first, min(first + size, end))
            yield _Block(row, tokens, context + first - starts[row])


@dataclass(frozen=True, slots=True)
class _Cache:
    """Both caches of a step, and what a query sees of them."""

    window_cache: Tensor
    window_table: Tensor
    page_size: int
    window: int
    entries: Tensor | None
    entry_table: Tensor | None
    ratio: int

    def decode(
        self, q: Tensor, position: Tensor, sinks: Tensor, selected: Tensor | None, scale: float
    ) -> Tensor:
        """One query per row: q (R, H, D), position (R,)."""
        longest = self.window_table.shape[1] * self.page_size
        back = torch.arange(1 - min(self.window, longest), 1, device=q.device)
        seen = position.unsqueeze(1) + back
        keys, visible = self._tokens(seen.clamp(min=0), self.window_table), seen >= 0
        if self.entries is not None and self.entry_table is not None:
            if selected is None:
                past = _entries(self.entries, self.entry_table, self.page_size, self.ratio)
                entry = torch.arange(past.shape[1], device=q.device)
                there = entry < ((position + 1) // self.ratio).unsqueeze(1)
            else:
                there = selected >= 0
                where = _slots(self.entry_table, selected.clamp(min=0), self.page_size, self.ratio)
                past = self.entries[where]
            keys = torch.cat((keys, past), dim=1)
            visible = torch.cat((visible, there), dim=1)
        return _attend(q.unsqueeze(1), keys, visible.unsqueeze(1), sinks, scale)[:, 0]

    def of_row(self, row: int, count: int) -> _Cache:
        """One row's caches as those of `count` rows."""
        window, entries = self.window_table[row : row + 1], self.entry_table
        entries = None if entries is None else entries[row : row + 1].expand(count, -1)
        return replace(self, window_table=window.expand(count, -1), entry_table=entries)

    def prefill(
        self, q: Tensor, block: _Block, sinks: Tensor, selected: Tensor | None, scale: float
    ) -> Tensor:
        """Queries of one row: q (n, H, D). They share their keys; what each sees is a mask."""
        last = block.last
        position = torch.arange(block.first, last, device=q.device).unsqueeze(1)
        seen = torch.arange(max(0, block.first - self.window + 1), last, device=q.device)
        table = self.window_table[block.row : block.row + 1]
        keys = self._tokens(seen.unsqueeze(0), table)
        visible = (seen <= position) & (seen > position - self.window)
        if self.entries is not None and self.entry_table is not None:
            width = -(-last // self.page_size)
            table = self.entry_table[block.row : block.row + 1, :width]
            past = _entries(self.entries, table, self.page_size, self.ratio)
            past = past[:, : last // self.ratio]
            entry = torch.arange(past.shape[1], device=q.device)
            there = entry < (position + 1) // self.ratio
            if selected is not None:
                there = there & _named(selected, past.shape[1])
            keys = torch.cat((keys, past), dim=1)
            visible = torch.cat((visible, there), dim=1)
        return _attend(q.unsqueeze(0), keys, visible.unsqueeze(0), sinks, scale)[0]

    def _tokens(self, seen: Tensor, table: Tensor) -> Tensor:
        """seen (R, L) positions -> (R, L, D)."""
        page = table.long().gather(1, seen // self.page_size)
        return self.window_cache[page * self.page_size + seen % self.page_size]


def _named(selected: Tensor, width: int) -> Tensor:
    """(n, k) entries, -1 naming none -> (n, width) bool."""
    named = torch.zeros(len(selected), width + 1, dtype=torch.bool, device=selected.device)
    return named.scatter_(1, selected.where(selected >= 0, width), True)[:, :width]


def _entries(cache: Tensor, table: Tensor, page_size: int, ratio: int) -> Tensor:
    """(R, W, D): all entries that rows of these pages can have, in order."""
    count = table.shape[1] * page_size // ratio
    every = torch.arange(count, device=table.device).expand(len(table), count)
    return cache[_slots(table, every, page_size, ratio)]


def _slots(table: Tensor, entries: Tensor, page_size: int, ratio: int) -> Tensor:
    """entries (R, W) of rows with pages (R, P) -> (R, W) slots in the cache."""
    last = (entries + 1) * ratio - 1
    page = table.long().gather(1, last // page_size)
    return page * -(-page_size // ratio) + last % page_size // ratio


def _attend(q: Tensor, keys: Tensor, visible: Tensor, sinks: Tensor, scale: float) -> Tensor:
    """q (R, n, H, D), keys (R, L, D), visible (R, n, L) bool, sinks (H,) -> (R, n, H, D)."""
    rows, count, heads, dim = q.shape
    # What nobody sees gets the weight 0, which a NaN survives.
    keys = keys.float().masked_fill(~visible.any(dim=1).unsqueeze(-1), 0.0)
    together = q.reshape(rows, count * heads, dim).float()
    logits = (together @ keys.mT * scale).view(rows, count, heads, keys.shape[1])
    logits = logits.masked_fill(~visible.unsqueeze(2), -torch.inf)
    sink = sinks.view(1, 1, heads, 1).expand(rows, count, heads, 1)
    weights = torch.cat((logits, sink), dim=-1).softmax(dim=-1)[..., :-1]
    made = weights.reshape(rows, count * heads, keys.shape[1]) @ keys
    return made.view(rows, count, heads, dim).to(q.dtype)
