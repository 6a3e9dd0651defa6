"""`sample` for rows that ask for nothing but a temperature (and a grammar): the best logit, and for
a row that draws the exponential race, one program a row. Other rows go the generic way; which is
which stands in the step's sampling arrays, on the host.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from ...common.ops.draw import halves
from ...common.ops.sample import LONGEST
from ..interface_step import SamplingArrays
from ..torch_runtime.sampler import by_rows
from ..torch_runtime.sampler import draw as generic_draw
from .paging import mix32
from .tuning import Tuning

BLOCK = 2048


@triton.jit
def variate(h):
    """-log(1 - x) of x = (h + 1/2) / 2^32. From a half on, 1 - x is formed from the inverted bits,
    exactly; below it by the series of 2 * atanh(x / (2 - x)), where the logarithm loses digits."""
    tiny: tl.constexpr = 2.3283064365386963e-10
    upper = (h >> 31) == 1
    rest = ((h ^ tl.full((), 0xFFFFFFFF, tl.uint32)).to(tl.float32) + 0.5) * tiny
    x = (h.to(tl.float32) + 0.5) * tiny
    s = x / (2.0 - x)
    square = s * s
    series = tl.zeros_like(s)
    for odd in tl.static_range(15, 0, -2):
        series = series * square + 1.0 / odd
    return tl.where(upper, -tl.log(tl.where(upper, rest, 0.5)), 2.0 * s * series)


@triton.jit
def logits_block(logits_ptr, mask_ptr, start, vocab, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """(BLOCK,) logits, where NaN and banned tokens are -inf and +inf is 1e30; ids."""
    token = start + tl.arange(0, BLOCK)
    inside = token < vocab
    x = tl.load(logits_ptr + token, mask=inside, other=float("-inf")).to(tl.float32)
    x = tl.where(x == x, x, float("-inf"))
    x = tl.where(x == float("inf"), 1e30, x)
    if MASKED:
        word = tl.load(mask_ptr + token // 32, mask=inside, other=0)
        x = tl.where(((word >> (token % 32)) & 1) == 1, x, float("-inf"))
    return x, token


@triton.jit
def better(value, token, most, best):
    """Of each lane, the larger value; what came first among equals, which has the lower id."""
    wins = value > most
    return tl.where(wins, value, most), tl.where(wins, token, best)


@triton.jit
def sample_kernel(
    logits_ptr,
    mask_ptr,
    temperature_ptr,
    draws_ptr,
    out_ptr,
    vocab,
    logits_stride,
    mask_stride,
    MASKED: tl.constexpr,
    LONGEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    mask_ptr += row * mask_stride
    nobody: tl.constexpr = 0x7FFFFFFF
    most = tl.full((BLOCK,), float("-inf"), tl.float32)
    best = tl.full((BLOCK,), nobody, tl.int32)
    for start in range(0, vocab, BLOCK):
        x, token = logits_block(logits_ptr, mask_ptr, start, vocab, MASKED, BLOCK)
        most, best = better(x, token, most, best)
    peak = tl.max(most, axis=0)
    chosen = tl.min(tl.where(most == peak, best, nobody), axis=0)
    heat = tl.load(temperature_ptr + row)
    if (heat > 0.0) & (chosen != nobody):
        low = tl.load(draws_ptr + 2 * row).to(tl.uint32)
        high = tl.load(draws_ptr + 2 * row + 1).to(tl.uint32)
        most = tl.full((BLOCK,), -1.0, tl.float32)
        for start in range(0, vocab, BLOCK):
            x, token = logits_block(logits_ptr, mask_ptr, start, vocab, MASKED, BLOCK)
            h = mix32(token.to(tl.uint32) * tl.full((), 0x9E3779B9, tl.uint32) + low)
            ratio = tl.exp((x - peak) / heat) / tl.minimum(variate(mix32(h ^ high)), LONGEST)
            ratio = tl.where(x == float("-inf"), -1.0, ratio)
            most, best = better(ratio, token, most, best)
        peak = tl.max(most, axis=0)
        chosen = tl.min(tl.where(most == peak, best, nobody), axis=0)
    tl.store(out_ptr + row, tl.where(chosen == nobody, -1, chosen).to(tl.int64))


def sample(
    tuning: Tuning,
    logits: Tensor,
    sampling: SamplingArrays,
    grammar_mask: Tensor | None = None,
    pending: Tensor | None = None,
    *,
    wide: torch.dtype = torch.float64,
) -> Tensor:
    """As `torch_runtime.sampler.sample`."""

    def plain(
        logits: Tensor, s: SamplingArrays, words: Tensor | None, pending: Tensor | None
    ) -> Tensor:
        return _race(tuning, logits, *_asked(s, logits), words)

    chosen = plain_rows(sampling)
    return by_rows(chosen, plain, logits, sampling, grammar_mask, pending, wide=wide)


def _asked(s: SamplingArrays, like: Tensor) -> tuple[Tensor, Tensor]:
    """Temperatures (R,), and the draws' halves (R, 2) as int32 bit patterns, on the device."""
    arrays = s.temperature, halves(s.uniform).view(np.int32)
    heat, draws = (torch.from_numpy(x).to(like.device, non_blocking=True) for x in arrays)
    return heat, draws


def plain_rows(s: SamplingArrays) -> NDArray[np.bool_]:
    """(R,) rows whose logits are not adjusted and whose draw is not filtered."""
    adjusted = (s.repetition_penalty != 1) | (s.presence_penalty != 0) | (s.frequency_penalty != 0)
    adjusted |= np.diff(s.bias_start) > 0
    filtered = (s.top_k > 0) | (s.top_p < 1) | (s.min_p > 0)
    return ~adjusted & (~filtered | (s.temperature == 0))


def draw(
    tuning: Tuning,
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
    """As `torch_runtime.sampler.draw`, which has the filters."""
    if filtered:
        return generic_draw(logits, temperature, top_k, top_p, min_p, draws, filtered, wide=wide)
    return _race(tuning, logits, temperature, draws, None)


def _race(
    tuning: Tuning, logits: Tensor, heat: Tensor, draws: Tensor, grammar_mask: Tensor | None
) -> Tensor:
    rows, vocab = logits.shape
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if not rows:
        return out
    words = out if grammar_mask is None else grammar_mask
    sample_kernel[(rows,)](
        logits,
        words,
        heat,
        draws,
        out,
        vocab,
        logits.stride(0),
        words.stride(0),
        MASKED=grammar_mask is not None,
        LONGEST=LONGEST,
        BLOCK=BLOCK,
        num_warps=tuning.warps(BLOCK),
    )
    return out
