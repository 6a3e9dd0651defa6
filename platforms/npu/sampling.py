"""`sample` with top-k and top-p by `npu_top_k_top_p`. Page: op-plugin,
`torch_npu-npu_top_k_top_p.md`. It wants a k of 1 to 1024 for every row, so rows without one (but of
small vocabularies) go the generic way, and so do greedy ones. Not yet run on a device.

The op keeps every equal of the k-th largest, and of equals where top-p ends those of the highest
ids. The contract keeps as many as were asked for, lowest ids first: so what is taken from the op is
how many stay, and the draw is the contract's, of which a seed means the same on every platform.

Not used: `npu_top_k_top_p_sample`, which draws too. By its page its exponentials belong to places
of the sorted row and not to tokens, it adds a number to them, and no graph may hold it.
"""

from __future__ import annotations

from importlib import import_module

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...common.ops.draw import halves
from ..interface import DeviceFacts
from ..interface_kernels import Kernel, Problem
from ..interface_step import SamplingArrays
from ..torch_runtime.sampler import adjusted, by_rows, draw
from .library import PACKAGE, PRIORITY, refusal

MOST = 1024
FLAT = 2.0**-10
"""Exact factor, under which no logit's probability is zero: the op leaves such tokens out."""


def sample(
    logits: Tensor,
    sampling: SamplingArrays,
    grammar_mask: Tensor | None = None,
    pending: Tensor | None = None,
) -> Tensor:
    """As `torch_runtime.sampler.sample`."""
    chosen = rows_for_the_op(sampling, logits.shape[1])
    return by_rows(chosen, _filtered, logits, sampling, grammar_mask, pending)


def rows_for_the_op(s: SamplingArrays, vocab: int) -> NDArray[np.bool_]:
    """(R,) rows that draw, with a filter, among as many tokens as the op can keep."""
    filtered = (s.top_k > 0) | (s.top_p < 1)
    return (s.temperature > 0) & filtered & (_limits(s, vocab) <= MOST)


def _limits(s: SamplingArrays, vocab: int) -> NDArray[np.int32]:
    return np.where(s.top_k > 0, np.minimum(s.top_k, vocab), vocab).astype(np.int32)


def _filtered(
    logits: Tensor, s: SamplingArrays, grammar_mask: Tensor | None, pending: Tensor | None
) -> Tensor:
    x = adjusted(logits, s, grammar_mask, pending)
    arrays = (s.temperature, _limits(s, x.shape[1]), s.top_p, s.min_p)
    draws = np.ascontiguousarray(halves(s.uniform).view(np.int32))
    heat, limit, share, least, low_high = (
        torch.from_numpy(array).to(x.device, non_blocking=True) for array in (*arrays, draws)
    )
    kept = _kept(x, heat, limit, share if (s.top_p < 1).any() else None, least)
    x = x.masked_fill(~kept, -torch.inf)
    return draw(x, heat, limit, share, least, low_high, False)


def _kept(x: Tensor, heat: Tensor, limit: Tensor, share: Tensor | None, least: Tensor) -> Tensor:
    """(R, V) bool. Rows whose every token is banned are kept from the op, which would divide by
    nothing."""
    library = import_module(PACKAGE)
    best = x.amax(dim=-1, keepdim=True)
    x = torch.where(best == -torch.inf, 0.0, x)
    best = best.clamp(min=-1e30)
    largest = library.npu_top_k_top_p(x * FLAT, torch.ones_like(heat), limit) > -torch.inf
    kept = _first(x, largest, limit.unsqueeze(1))
    scaled = ((x - best) / heat.unsqueeze(1)).masked_fill(~kept, -torch.inf)
    if share is not None:
        stay = library.npu_top_k_top_p(scaled, share, limit) > -torch.inf
        kept = _first(x.masked_fill(~kept, -torch.inf), stay, stay.sum(dim=-1, keepdim=True))
    return kept & (scaled.exp() >= least.unsqueeze(1))


def _first(x: Tensor, kept: Tensor, count: Tensor) -> Tensor:
    """(R, V) bool: `count` (R, 1) of the tokens of x (R, V) down to the least one of `kept`; of
    those that equal it, the first."""
    threshold = torch.where(kept, x, torch.inf).amin(dim=-1, keepdim=True)
    above, equal = x > threshold, x == threshold
    missing = count - above.sum(dim=-1, keepdim=True)
    return above | (equal & (equal.cumsum(dim=-1, dtype=torch.int32) <= missing))


def _requires(facts: DeviceFacts, problem: Problem) -> str | None:
    return refusal(facts)


KERNELS = (Kernel("sample", PACKAGE, _requires, sample, PRIORITY),)
