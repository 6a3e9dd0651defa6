"""Choosing one token per row from logits, all sampling parameters included.

Order of application, fixed for every platform:
1. a NaN logit counts as -inf (the token is banned), +inf as 1e30;
2. logit bias is added (-inf bans);
3. repetition penalty r over prompt and output tokens: positive logits are divided by r, others
   multiplied (Keskar et al. 2019, section 4.1, made sign-aware);
4. presence and frequency penalty over output tokens: logit - presence - frequency * count;
5. grammar mask: a clear bit bans;
6. temperature 0: the largest logit, lowest id among equals, and nothing of what follows;
   otherwise logits are divided by the temperature;
7. top-k keeps the k largest; 8. top-p keeps, of those and renormalised, the shortest prefix in
   descending order whose mass reaches p (Holtzman et al. 2020); ties in both go to the lowest id;
9. min-p keeps tokens with at least min_p times the probability of the most likely one;
10. the draw: every token gets an exponential variate hashed from `uniform` and its id, and the
    largest ratio of weight to variate wins, the lowest id among equals (the exponential race, the
    Gumbel-max trick of Maddison et al. 2014 without its logarithm). A rounding of the logits then
    changes the token only where two ratios nearly tie; a search in the cumulative distribution
    would move by whole tokens in the tail, and a seed would mean little under another batch.

A row whose every token is banned has no answer: it gets -1, and the step's result says so by
`accepted` 0 for a row that wanted a sample; the engine fails that request and no other.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...platforms.interface_kernels import Op
from ...platforms.interface_step import SamplingArrays
from .contract import EXACT, F32, I64
from .sample_cases import cases

F64 = NDArray[np.float64]

LONGEST = 22.0
"""Bound of a variate (about -log of 2^-32), so that float32's rounding of x to 1 harms nobody."""


def sample(
    logits: F32,
    sampling: SamplingArrays,
    grammar_mask: NDArray[np.uint32] | None = None,
    pending: I64 | None = None,
) -> I64:
    """logits (R, V) float32, sampling of the same R rows, grammar_mask (R, ceil(V/32)) or None,
    pending (R,) a token that counts as output though it is not in `output_ids`, -1 = none
    -> token ids (R,), -1 for a row without any allowed token."""
    result = np.full(len(logits), -1, np.int64)
    for row in range(len(logits)):
        adjusted = _adjust(logits[row], sampling, row, -1 if pending is None else int(pending[row]))
        if grammar_mask is not None:
            adjusted[~unpack_mask(grammar_mask[row], len(adjusted))] = -np.inf
        if np.isneginf(adjusted).all():
            continue
        result[row] = _choose(adjusted, sampling, row)
    return result


def unpack_mask(words: NDArray[np.uint32], vocab: int) -> NDArray[np.bool_]:
    """Token t is allowed when bit t % 32 of word t // 32 is set."""
    ids = np.arange(vocab)
    return ((words[ids // 32] >> (ids % 32).astype(np.uint32)) & 1).astype(bool)


def _adjust(logits: F32, s: SamplingArrays, row: int, pending: int) -> F32:
    x = np.nan_to_num(logits, nan=-np.inf, posinf=1e30, neginf=-np.inf).astype(np.float32)
    bias = slice(s.bias_start[row], s.bias_start[row + 1])
    x[s.bias_ids[bias]] += s.bias_values[bias]
    prompt = s.prompt_ids[s.prompt_start[row] : s.prompt_start[row + 1]]
    output = s.output_ids[s.output_start[row] : s.output_start[row + 1]]
    if pending >= 0:
        output = np.append(output, pending)
    seen = np.unique(np.concatenate([prompt, output]).astype(np.int64))
    r = s.repetition_penalty[row]
    x[seen] = np.where(x[seen] > 0, x[seen] / r, x[seen] * r)
    made, counts = np.unique(output.astype(np.int64), return_counts=True)
    x[made] -= s.presence_penalty[row] + s.frequency_penalty[row] * counts.astype(np.float32)
    return x


def _choose(x: F32, s: SamplingArrays, row: int) -> int:
    if s.temperature[row] == 0:
        return int(np.argmax(x))
    scaled = (x.astype(np.float64) - x.max()) / s.temperature[row]
    weights = np.where(_kept(scaled, s, row), np.exp(scaled), 0.0)
    return int(np.argmax(weights / exponentials(float(s.uniform[row]), len(x))))


def exponentials(uniform: float, vocab: int) -> F64:
    """(vocab,) standard exponential variates of one draw, each a hash of (uniform, token id).

    The 53 bits of `uniform` split into a low word of 32 and a high word; two rounds of
    MurmurHash3's 32-bit finaliser give h; with x = (h + 1/2) / 2^32 the variate is -log(1 - x), at
    most LONGEST.
    """
    bits = int(uniform * 2.0**53)
    low, high = np.uint32(bits & 0xFFFFFFFF), np.uint32(bits >> 32)
    h = mix32(np.arange(vocab, dtype=np.uint32) * np.uint32(0x9E3779B9) + low)
    h = mix32(h ^ high)
    return np.minimum(-np.log1p(-(h + 0.5) / 2.0**32), LONGEST)


def mix32(h: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """MurmurHash3's fmix32 (Appleby): every input bit reaches every output bit."""
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return h ^ (h >> np.uint32(16))


def _kept(scaled: F64, s: SamplingArrays, row: int) -> NDArray[np.bool_]:
    order = np.argsort(-scaled, kind="stable")  # descending, lowest id first among equals
    count = len(order) if s.top_k[row] <= 0 else min(int(s.top_k[row]), len(order))
    order = order[:count]
    if s.top_p[row] < 1:
        mass = np.exp(scaled[order])
        before = np.cumsum(mass) - mass
        order = order[: max(1, int((before < s.top_p[row] * mass.sum()).sum()))]
    kept = np.zeros(len(scaled), bool)
    kept[order] = True
    if s.min_p[row] > 0:
        kept &= scaled >= np.log(s.min_p[row])
    return kept


OPS = (Op("sample", sample, cases, EXACT, float32=frozenset({"logits"})),)
