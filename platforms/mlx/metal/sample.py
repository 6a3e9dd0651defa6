"""`sample` in one launch for rows that ask for nothing but a temperature (and a grammar): the best
logit, and for a row that draws the exponential race, with one threadgroup per row.

Rows that ask for more go the generic way; which is which stands in the step's sampling arrays.
Nothing here computes with infinities or tests for NaN by comparing: a compiler allowed to assume
that there are none would be right.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ....common.ops.sample import LONGEST
from ...interface_step import SamplingArrays
from ...sampling_rows import select_rows
from ..sampler import sample as generic_sample
from .launch import Launch, Launcher, MetalSource
from .mixing import MIX32

THREADS = 512

# The variate is -log(1 - x) with x = (h + 1/2) / 2^32. From a half on, 1 - x is formed from the
# inverted bits, exactly; below it, where log(1 - x) would lose digits, by the series of
# 2 * atanh(x / (2 - x)), whose first term left out is below 1e-8 of the sum.
VARIATE = """
inline float sixfold_variate(uint h) {
  if (h >> 31)
    return metal::min(-metal::precise::log((float(~h) + 0.5f) * TINY), LONGEST);
  const float x = (float(h) + 0.5f) * TINY;
  const float s = x / (2.0f - x);
  const float square = s * s;
  float sum = 0.0f;
  for (int n = 15; n > 0; n -= 2) sum = sum * square + 1.0f / float(n);
  return 2.0f * s * sum;
}
""".replace("LONGEST", f"{LONGEST}f").replace("TINY", f"{2.0**-32!r}f")

# NaN and -inf ban a token, +inf counts as 1e30.
LOGIT = """
inline bool sixfold_open(float logit) {
  const uint bits = as_type<uint>(logit);
  return bits != 0xFF800000u && (bits & 0x7FFFFFFFu) <= 0x7F800000u;
}
inline float sixfold_finite(float logit) {
  return as_type<uint>(logit) == 0x7F800000u ? 1e30f : logit;
}
"""

# The next token of a thread's share; skips those that are banned.
NEXT = """
        if (MASKED && ((allowed[mask + t / 32] >> (t % 32)) & 1u) == 0) continue;
        if (!sixfold_open(logits[base + t])) continue;
        const float x = sixfold_finite(logits[base + t]);
"""

# Largest value with its lowest id, over the threads of a threadgroup; every thread gets it.
BEST = """
    {
      const float most = simd_max(value);
      const int lowest = simd_min(value == most ? id : NOBODY);
      if (thread_index_in_simdgroup == 0) {
        shared_values[simdgroup_index_in_threadgroup] = most;
        shared_ids[simdgroup_index_in_threadgroup] = lowest;
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      const bool there = thread_index_in_simdgroup < GROUPS;
      value = there ? shared_values[thread_index_in_simdgroup] : LOWEST;
      id = there ? shared_ids[thread_index_in_simdgroup] : NOBODY;
      const float over_all = simd_max(value);
      id = simd_min(value == over_all ? id : NOBODY);
      value = over_all;
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
"""

SOURCE = MetalSource(
    name="sample",
    inputs=("logits", "temperature", "draws", "allowed", "vocab"),
    outputs=("tokens",),
    header=MIX32 + VARIATE + LOGIT,
    body="""
    constexpr int NOBODY = 0x7FFFFFFF;
    constexpr float LOWEST = -3.4028234e38f;
    threadgroup float shared_values[GROUPS];
    threadgroup int shared_ids[GROUPS];
    const size_t row = threadgroup_position_in_grid.y;
    const size_t base = row * size_t(vocab);
    const size_t mask = row * ((size_t(vocab) + 31) / 32);
    const int first = int(thread_position_in_threadgroup.x);

    float value = LOWEST;
    int id = NOBODY;
    for (int t = first; t < vocab; t += 32 * GROUPS) {
      NEXT
      if (x > value || id == NOBODY) {
        value = x;
        id = t;
      }
    }
    BEST
    const float best = value;
    const float heat = temperature[row];
    const bool draws_one = heat > 0.0f && id != NOBODY;
    if (draws_one) {
      const uint low = draws[2 * row];
      const uint high = draws[2 * row + 1];
      value = LOWEST;
      id = NOBODY;
      for (int t = first; t < vocab; t += 32 * GROUPS) {
        NEXT
        const uint h = sixfold_mix32(sixfold_mix32(uint(t) * 0x9E3779B9u + low) ^ high);
        const float ratio = metal::precise::exp((x - best) / heat) / sixfold_variate(h);
        if (ratio > value || id == NOBODY) {
          value = ratio;
          id = t;
        }
      }
      BEST
    }
    if (first == 0) tokens[row] = id == NOBODY ? -1 : id;
    """.replace("BEST", BEST).replace("NEXT", NEXT),
)


def sample(
    launch: Launcher,
    logits: mx.array,
    sampling: SamplingArrays,
    grammar_mask: mx.array | None = None,
    pending: mx.array | None = None,
) -> mx.array:
    """As `sampler.sample`."""
    plain = plain_rows(sampling)
    if not plain.any():
        return generic_sample(logits, sampling, grammar_mask, pending)
    if plain.all():
        return _race(launch, logits, sampling, grammar_mask)
    tokens = mx.zeros((len(plain),), mx.int32)
    for is_plain in (True, False):
        chosen = np.flatnonzero(plain == is_plain)
        rows = mx.array(chosen.astype(np.uint32))
        words, waiting = (None if x is None else x[rows] for x in (grammar_mask, pending))
        some = select_rows(sampling, chosen)
        if is_plain:
            tokens[rows] = _race(launch, logits[rows], some, words)
        else:
            tokens[rows] = generic_sample(logits[rows], some, words, waiting)
    return tokens


def plain_rows(s: SamplingArrays) -> NDArray[np.bool_]:
    """(R,) rows whose logits are not adjusted and whose draw is not filtered."""
    adjusted = (s.repetition_penalty != 1) | (s.presence_penalty != 0) | (s.frequency_penalty != 0)
    adjusted |= np.diff(s.bias_start) > 0
    filtered = (s.top_k > 0) | (s.top_p < 1) | (s.min_p > 0)
    return ~adjusted & (~filtered | (s.temperature == 0))


def _race(
    launch: Launcher, logits: mx.array, s: SamplingArrays, grammar_mask: mx.array | None
) -> mx.array:
    rows, vocab = logits.shape
    bits = (s.uniform * 2.0**53).astype(np.uint64)
    draws = np.stack([bits & np.uint64(0xFFFFFFFF), bits >> np.uint64(32)], axis=1)
    call = Launch(
        inputs=[
            logits.astype(mx.float32),
            mx.array(s.temperature),
            mx.array(draws.astype(np.uint32)),
            mx.zeros((1, 1), mx.uint32) if grammar_mask is None else grammar_mask,
            mx.array(vocab, mx.int32),
        ],
        template=[("GROUPS", THREADS // 32), ("MASKED", grammar_mask is not None)],
        threads=(THREADS, rows, 1),
        group=THREADS,
        shapes=[(rows,)],
        dtypes=[mx.int32],
    )
    return launch(SOURCE, call)[0]
