"""Generic kernels of recurrent mixers: the short convolution and the gated delta rule, over a
step's rows with their states in slots (`common/ops/state_rows.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own spelling)
from torch import Tensor

from ...common.ops.gated_delta import EPS
from .state_slots import idle_slot

CHUNK = 64
"""Tokens of a row that the chunked form takes at once."""


def conv1d_update(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    slots: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    activate: bool,
) -> tuple[Tensor, Tensor]:
    """Inputs and the rows' states lie in one list, in which every tap of every token has a place:
    first the states, then a row of zeros, then the inputs."""
    taps, rows = weight.shape[1], len(slots)
    kept = taps - 1
    context_lens = context_lens * (slots >= 0)  # padding begins from zero
    past = state.index_select(0, slots.clamp(min=0)).view(rows * kept, x.shape[1])
    pool = torch.cat((past, x.new_zeros(1, x.shape[1]), x))
    row = _row_of_token(query_start, len(x))
    wide = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    token = torch.arange(len(x), device=x.device)
    for i in range(taps):
        place = _place(token - kept + i, row, query_start, context_lens, kept)
        wide += pool.index_select(0, place).float() * weight[:, i].float()
    if bias is not None:
        wide += bias.float()
    result = (F.silu(wide) if activate else wide) * (slots[row] >= 0).unsqueeze(1)
    newest = query_start[1:, None] - kept + torch.arange(kept, device=x.device)
    every = torch.arange(rows, device=x.device).unsqueeze(1).expand(rows, kept)
    place = _place(newest, every, query_start, context_lens, kept)
    new = pool.index_select(0, place.reshape(-1)).view(rows, kept, x.shape[1])
    return result.to(x.dtype), _store(state, slots, new)


def _row_of_token(query_start: Tensor, tokens: int) -> Tensor:
    token = torch.arange(tokens, device=query_start.device, dtype=query_start.dtype)
    return torch.searchsorted(query_start[1:].contiguous(), token, right=True)


def _place(
    token: Tensor, row: Tensor, query_start: Tensor, context_lens: Tensor, kept: int
) -> Tensor:
    """Where in the pool the input of the step's token `token` is, which may lie before its row."""
    rows = len(context_lens)
    before = token - query_start[row]
    past = torch.where(context_lens[row] > 0, row * kept + kept + before, rows * kept)
    return torch.where(before >= 0, rows * kept + 1 + token, past).long()


def _store(state: Tensor, slots: Tensor, new: Tensor) -> Tensor:
    """New states into their slots. Padding writes back what a slot holds: all shapes are static,
    so a captured step stays one. Its slot is one that no row has."""
    rows = len(slots)
    if not rows:
        return state
    active = slots >= 0
    where = torch.where(active, slots.long(), idle_slot(slots, len(state)))
    shape = (rows, *[1] * (new.dim() - 1))
    old = state.index_select(0, where)
    return state.index_copy_(0, where, torch.where(active.view(shape), new.to(state.dtype), old))


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What the rule reads, float32, a head of keys for every head of values. (tokens, heads, …)."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor  # logarithm of the decay
    beta: Tensor

    def take(self, tokens: Tensor) -> _Inputs:
        """Of some tokens, (n,) or (n, m)."""
        return _Inputs(*(x[tokens] for x in (self.q, self.k, self.v, self.g, self.beta)))


def gated_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    slots: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
) -> tuple[Tensor, Tensor]:
    """Rows with one token follow the recurrence, all at once. Longer rows go in chunks, of all
    rows that are that long; how many there are is read on the host."""
    inputs = _inputs(q, k, v, a, b, a_log, dt_bias)
    begun = state.index_select(0, slots.clamp(min=0).long())
    fresh = (context_lens == 0) | (slots < 0)
    s = torch.where(fresh.view(-1, 1, 1, 1), 0.0, begun)
    if len(q) == len(slots):
        result, s = _recurrence(inputs, s)
    else:
        result, s = _rows(inputs, s, query_start.tolist())
    result = result * (slots[_row_of_token(query_start, len(q))] >= 0).view(-1, 1, 1)
    return result.to(v.dtype), _store(state, slots, s)


def _inputs(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor
) -> _Inputs:
    groups = v.shape[1] // q.shape[1]

    def unit(x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * (wide.square().sum(dim=-1, keepdim=True) + EPS).rsqrt()
        return wide.repeat_interleave(groups, dim=1)

    g = -a_log.exp() * F.softplus(a.float() + dt_bias, threshold=88.0)
    return _Inputs(unit(q) * q.shape[-1] ** -0.5, unit(k), v.float(), g, b.float().sigmoid())


def _recurrence(x: _Inputs, s: Tensor) -> tuple[Tensor, Tensor]:
    """One token per row: s (rows, heads, Dk, Dv) before -> (rows, heads, Dv) and s behind it."""
    s = s * x.g.exp()[..., None, None]
    change = x.beta.unsqueeze(-1) * (x.v - (s * x.k.unsqueeze(-1)).sum(dim=-2))
    s = s + x.k.unsqueeze(-1) * change.unsqueeze(-2)
    return (s * x.q.unsqueeze(-1)).sum(dim=-2), s


def _rows(x: _Inputs, s: Tensor, starts: list[int]) -> tuple[Tensor, Tensor]:
    device, result = x.v.device, torch.zeros_like(x.v)
    lengths = [stop - start for start, stop in pairwise(starts)]
    single = torch.tensor([r for r, n in enumerate(lengths) if n == 1], device=device).long()
    if len(single):
        tokens = torch.tensor([starts[r] for r in single.tolist()], device=device)
        result[tokens], s[single] = _recurrence(x.take(tokens), s[single])
    longest = max(lengths)
    for first in range(0, longest if longest > 1 else 0, CHUNK):
        rows = [r for r, n in enumerate(lengths) if n > max(first, 1)]
        width = min(CHUNK, max(lengths[r] for r in rows) - first)
        offset = torch.arange(first, first + width, device=device)
        begin = torch.tensor([starts[r] for r in rows], device=device).unsqueeze(1)
        real = offset < torch.tensor([lengths[r] for r in rows], device=device).unsqueeze(1)
        tokens = torch.where(real, begin + offset, begin)
        chosen = torch.tensor(rows, device=device)
        part, s[chosen] = _chunk(_masked(x.take(tokens), real), s[chosen])
        result[tokens[real]] = part[real]
    return result, s


def _masked(x: _Inputs, real: Tensor) -> _Inputs:
    """Padding that leaves a state as it is: no decay, and nothing to write. (rows, n, heads, …)."""
    on = real.unsqueeze(-1)
    return _Inputs(x.q, x.k, x.v, x.g * on, x.beta * on)


def _chunk(x: _Inputs, s: Tensor) -> tuple[Tensor, Tensor]:
    """The paper's chunked form: x (rows, n, heads, …), s (rows, heads, Dk, Dv)
    -> (rows, n, heads, Dv) and the state behind the chunk."""
    q, k, v = (y.transpose(1, 2) for y in (x.q, x.k, x.v))
    total = x.g.transpose(1, 2).cumsum(dim=-1)
    beta = x.beta.transpose(1, 2).unsqueeze(-1)
    apart = total.unsqueeze(-1) - total.unsqueeze(-2)
    # Masked before the exponential: above the diagonal it would overflow.
    lower = torch.ones(apart.shape[-2:], dtype=torch.bool, device=s.device).tril()
    decay = apart.masked_fill(~lower, -torch.inf).exp()
    mixing = (beta * (k @ k.mT) * decay).tril(-1)
    since = total.exp().unsqueeze(-1)
    wanted = torch.cat((beta * v, beta * since * k), dim=-1)
    eye = torch.eye(mixing.shape[-1], device=s.device)
    solved = torch.linalg.solve_triangular(eye + mixing, wanted, upper=False, unitriangular=True)
    u, w = solved.split((v.shape[-1], k.shape[-1]), dim=-1)
    new = u - w @ s
    result = (since * q) @ s + ((q @ k.mT) * decay) @ new
    last = total[..., -1:].unsqueeze(-1)
    left = (total[..., -1:] - total).exp().unsqueeze(-1)
    return result.transpose(1, 2), last.exp() * s + (left * k).mT @ new
