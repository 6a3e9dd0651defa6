"""The generic `sample` kernel: one token per row, all rows at once, no read of device values.

The contract and the order of application are in `common/ops/sample.py`. Work is done only for what
some row asks: a step of greedy rows costs one arg-max. Filters need the sorted values of their rows
but no sorted ids: the value of the last token kept and the number of its equals to keep define the
kept set, so ties go to the lowest id whatever the sort does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...common.ops.draw import halves
from ...common.ops.sample import LONGEST
from ..interface_step import SamplingArrays
from ..sampling_rows import select_rows

Sample = Callable[[Tensor, SamplingArrays, Tensor | None, Tensor | None], Tensor]


def sample(
    logits: Tensor,
    sampling: SamplingArrays,
    grammar_mask: Tensor | None = None,
    pending: Tensor | None = None,
    *,
    wide: torch.dtype = torch.float64,
    shortlist: int = 0,
) -> Tensor:
    """logits (R, V) float32; grammar_mask (R, ceil(V/32)) int32 bit patterns; pending (R,) int64
    -> token ids (R,) int64. `logits` is left as it is.

    `wide` is the dtype of sums over the vocabulary. `shortlist` > 0 says that reading a value on
    the host is free: then clean logits are not copied, and a sort is tried on that many best
    tokens first.
    """
    adjusting = len(sampling.bias_ids) or grammar_mask is not None or len(_penalised(sampling))
    drawing = np.flatnonzero(sampling.temperature > 0)
    x, clean = logits, False
    if shortlist and not adjusting:
        best, tokens, clean = _best_on_host(x)
    if not clean:
        x = adjusted(logits, sampling, grammar_mask, pending)
        best, tokens = x.max(dim=-1)
    elif not len(drawing):
        return tokens
    if len(drawing) == len(x):
        tokens = _draw(x, best, sampling, drawing, wide, shortlist)
    elif len(drawing):
        rows = _index(drawing, x)
        drawn = _draw(x[rows], best[rows], sampling, drawing, wide, shortlist)
        tokens = tokens.index_copy(0, rows, drawn)
    return torch.where(best == -torch.inf, -1, tokens)


def by_rows(
    chosen: NDArray[np.bool_],
    special: Sample,
    logits: Tensor,
    sampling: SamplingArrays,
    grammar_mask: Tensor | None,
    pending: Tensor | None,
    *,
    wide: torch.dtype = torch.float64,
) -> Tensor:
    """`special` for the `chosen` rows (R,), `sample` with `wide` for the others."""
    rest = partial(sample, wide=wide)
    if not chosen.any():
        return rest(logits, sampling, grammar_mask, pending)
    if chosen.all():
        return special(logits, sampling, grammar_mask, pending)
    result = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    for wanted, work in ((True, special), (False, rest)):
        places = np.flatnonzero(chosen == wanted)
        rows = _index(places, logits)
        words, waiting = (None if x is None else x[rows] for x in (grammar_mask, pending))
        tokens = work(logits[rows], select_rows(sampling, places), words, waiting)
        result.index_copy_(0, rows, tokens)
    return result


def adjusted(
    logits: Tensor,
    sampling: SamplingArrays,
    grammar_mask: Tensor | None = None,
    pending: Tensor | None = None,
) -> Tensor:
    """Steps 1 to 5 of the contract, in a copy."""
    x = torch.nan_to_num(logits, nan=-torch.inf, posinf=1e30, neginf=-torch.inf)
    _add_bias(x, sampling)
    _penalise(x, sampling, pending)
    if grammar_mask is not None:
        x.masked_fill_(~unpack_mask(grammar_mask, x.shape[1]), -torch.inf)
    return x


def _best_on_host(x: Tensor) -> tuple[Tensor, Tensor, bool]:
    """x (R, V) on the host -> the largest value of each row, the first of NaN if there is any; its
    first place; whether all are finite. numpy's search is an order of magnitude faster than torch's
    `max` there."""
    values = x.numpy()
    tokens = np.asarray(values.argmax(axis=-1))
    best = values[np.arange(len(values)), tokens]
    return torch.from_numpy(best), torch.from_numpy(tokens), bool(np.isfinite(best).all())


def unpack_mask(words: Tensor, vocab: int) -> Tensor:
    """(R, W) int32 bit patterns -> (R, vocab) bool."""
    shifts = torch.arange(32, device=words.device, dtype=torch.int32)
    bits = (words.unsqueeze(-1) >> shifts) & 1
    return bits.view(len(words), -1)[:, :vocab].bool()


def _index(values: NDArray[np.generic], like: Tensor) -> Tensor:
    return torch.from_numpy(values.astype(np.int64)).to(like.device, non_blocking=True)


def _column(
    values: NDArray[np.generic], like: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """(R,) host values -> (R, 1) on the device of `like`."""
    return torch.from_numpy(values).to(like.device, dtype, non_blocking=True).unsqueeze(1)


def _add_bias(x: Tensor, s: SamplingArrays) -> None:
    if not len(s.bias_ids):
        return
    rows = _index(np.repeat(np.arange(len(x)), np.diff(s.bias_start)), x)
    ids = _index(s.bias_ids, x)
    values = torch.from_numpy(s.bias_values).to(x.device, non_blocking=True)
    x[rows, ids] = x[rows, ids] + values


def _penalised(s: SamplingArrays) -> NDArray[np.intp]:
    """Rows with a penalty."""
    penalised = (s.repetition_penalty != 1) | (s.presence_penalty != 0) | (s.frequency_penalty != 0)
    return np.flatnonzero(penalised)


def _penalise(x: Tensor, s: SamplingArrays, pending: Tensor | None) -> None:
    chosen = _penalised(s)
    if not len(chosen):
        return
    repetition = s.repetition_penalty[chosen]
    rows = _index(chosen, x)
    part = x[rows]
    made = _counts(part, chosen, s.output_start, s.output_ids)
    if pending is not None:
        new = pending[rows].unsqueeze(1)
        made.scatter_add_(1, new.clamp(min=0), (new >= 0).to(made.dtype))
    if (repetition != 1).any():
        seen = (_counts(part, chosen, s.prompt_start, s.prompt_ids) + made) > 0
        factor = _column(repetition, x)
        part = torch.where(seen, torch.where(part > 0, part / factor, part * factor), part)
    part -= _column(s.presence_penalty[chosen], x) * (made > 0)
    part -= _column(s.frequency_penalty[chosen], x) * made
    x[rows] = part


def _counts(
    like: Tensor, rows: NDArray[np.generic], start: NDArray[np.int32], ids: NDArray[np.int32]
) -> Tensor:
    """(len(rows), V) float32: how often each token is in the ragged ids of each of `rows`."""
    counts = torch.zeros_like(like)
    position = np.full(len(start) - 1, -1)
    position[rows] = np.arange(len(rows))
    owner = np.repeat(position, np.diff(start))
    cells, repeats = np.unique(
        owner[owner >= 0] * like.shape[1] + ids[owner >= 0], return_counts=True
    )
    if len(cells):
        values = torch.from_numpy(repeats.astype(np.float32)).to(like.device, non_blocking=True)
        counts.view(-1).index_copy_(0, _index(cells, like), values)
    return counts


def draw(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    draws: Tensor,
    filtered: bool,
    *,
    wide: torch.dtype = torch.float64,
) -> Tensor:
    """Contract in `common/ops/draw.py`; draws (R, 2) int32 bit patterns. What runs depends on
    shapes and `filtered` alone, and nothing is made from host values."""
    x = torch.nan_to_num(logits, nan=-torch.inf, posinf=1e30, neginf=-torch.inf)
    best, tokens = x.max(dim=-1)
    peak = best.clamp(min=-1e30).unsqueeze(1)
    heat = torch.where(temperature > 0, temperature, 1.0).unsqueeze(1)
    weights = (x - peak).div_(heat).exp_()
    if filtered:
        vocab = x.shape[1]
        limit = torch.where(top_k > 0, top_k.clamp(max=vocab), vocab).to(torch.int64).unsqueeze(1)
        share = torch.where(top_p < 1, top_p.to(wide), torch.inf).unsqueeze(1)
        weights *= _kept(x, peak, weights, limit, share, heat, 0)
        weights *= weights >= min_p.unsqueeze(1)
    low, high = draws.unsqueeze(-1).unbind(1)
    drawn = weights.div_(_exponentials(low, high, x)).argmax(dim=-1)
    return torch.where(best == -torch.inf, -1, torch.where(temperature > 0, drawn, tokens))


def _draw(
    x: Tensor,
    best: Tensor,
    s: SamplingArrays,
    rows: NDArray[np.generic],
    wide: torch.dtype,
    shortlist: int,
) -> Tensor:
    """The exponential race of the contract. x (N, V) are the logits of `rows` of the sampling
    arrays."""
    best = best.clamp(min=-1e30).unsqueeze(1)  # a row of -inf is refused by the caller
    heat = _column(s.temperature[rows], x)
    weights = (x - best).div_(heat).exp_()
    sorting = np.flatnonzero((s.top_k[rows] > 0) | (s.top_p[rows] < 1))
    if len(sorting):
        where = _index(sorting, x)
        part = slice(None) if len(sorting) == len(rows) else where
        filters = _filters(s, rows[sorting], x, wide)
        kept = _kept(x[part], best[part], weights[part], *filters, heat[part], shortlist)
        weights[part] *= kept
    if (s.min_p[rows] > 0).any():
        weights *= weights >= _column(s.min_p[rows], x)  # the best token's weight is 1
    low, high = (
        _column(half.view(np.int32), x, torch.int32)
        for half in np.ascontiguousarray(halves(s.uniform[rows]).T)
    )
    return weights.div_(_exponentials(low, high, x)).argmax(dim=-1)


def _filters(
    s: SamplingArrays, rows: NDArray[np.generic], x: Tensor, wide: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(N, 1), (N, 1): how many tokens top-k keeps, and the share that top-p wants, inf = all."""
    vocab = x.shape[1]
    top_k = np.where(s.top_k[rows] > 0, np.minimum(s.top_k[rows], vocab), vocab)
    share = np.where(s.top_p[rows] < 1, s.top_p[rows], np.inf)
    return _column(top_k, x, torch.int64), _column(share, x, wide)


def _exponentials(low: Tensor, high: Tensor, like: Tensor) -> Tensor:
    """(N, V) float32: what `exponentials` of the contract gives for draws whose 53 bits are `low`
    and `high`, (N, 1) int32 bit patterns."""
    ids = torch.arange(like.shape[1], dtype=torch.int32, device=like.device)
    h = mix32(mix32(ids * signed(0x9E3779B9) + low) ^ high)
    x = (h.float() + torch.where(h < 0, 2.0**32 + 0.5, 0.5)) * 2.0**-32
    return x.neg_().log1p_().neg_().clamp_(max=LONGEST)


def mix32(h: Tensor) -> Tensor:
    """`mix32` of the contract on int32, whose products wrap and whose shifts keep the sign."""
    h = (h ^ ((h >> 16) & 0xFFFF)) * signed(0x85EBCA6B)
    h = (h ^ ((h >> 13) & 0x7FFFF)) * signed(0xC2B2AE35)
    return h ^ ((h >> 16) & 0xFFFF)


def signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def _kept(
    x: Tensor,
    best: Tensor,
    weights: Tensor,
    limit: Tensor,
    share: Tensor,
    temperature: Tensor,
    shortlist: int,
) -> Tensor:
    """(N, V) bool: what top-k and then top-p keep; limit and share as `_filters` gives them, the
    latter in the dtype of sums."""
    vocab, wide = x.shape[1], share.dtype
    everything = weights.sum(dim=-1, keepdim=True, dtype=wide)
    length = min(shortlist, vocab) if shortlist else vocab
    while True:
        values = _largest(x, length)
        inside = torch.arange(length, device=x.device) < limit
        mass = (torch.exp((values - best) / temperature) * inside).to(wide)
        reached = mass.cumsum(dim=-1)
        total = torch.where(limit < vocab, reached[:, -1:], everything)
        if length == vocab:
            break
        # A short list suffices when top-k ends inside it, or top-p does and the total is known.
        enough = (limit == vocab) & (reached[:, -1:] >= share * total)
        if bool(((limit <= length) | enough).all()):
            break
        length = vocab
    count = (inside & (reached - mass < share * total)).sum(dim=-1, keepdim=True).clamp(min=1)
    threshold = values.gather(1, count - 1)
    equals = count - (values > threshold).sum(dim=-1, keepdim=True)
    if shortlist and not bool(((x >= threshold).sum(dim=-1, keepdim=True) > count).any()):
        return x >= threshold  # no equals to leave out
    equal = x == threshold
    return (x > threshold) | (equal & (equal.cumsum(dim=-1, dtype=torch.int32) <= equals))


def _largest(x: Tensor, count: int) -> Tensor:
    """The `count` largest values of each row, descending."""
    if count < x.shape[1]:
        return torch.topk(x, count, dim=-1)[0]
    return torch.sort(x, dim=-1, descending=True)[0]
