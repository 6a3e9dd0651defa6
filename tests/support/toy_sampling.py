"""A small numpy sampler, written from the order of application in `SamplingArrays` alone: what the
toy platform samples with, and a second opinion on `common/ops/sample.py`."""

from __future__ import annotations

import math

import numpy as np

from sixfold.platforms.interface_step import PromptLogprobs, StepBatch


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """(..., V) -> natural logarithms of probabilities."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def best(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` largest, best first, lowest id first among equals."""
    return np.argsort(-values, axis=-1, kind="stable")[..., :count]


def sample(raw: np.ndarray, batch: StepBatch, r: int, new_tokens: np.ndarray) -> int:
    """One token of row r from its raw logits (V,), -1 when every token is banned. `new_tokens`:
    those of the step, resolved."""
    p, start, end = batch.sampling, batch.query_start[r], batch.query_start[r + 1]
    logits = raw.astype(np.float64)
    span = slice(p.bias_start[r], p.bias_start[r + 1])
    np.add.at(logits, p.bias_ids[span], p.bias_values[span])
    prompt = p.prompt_ids[p.prompt_start[r] : p.prompt_start[r + 1]]
    pending = new_tokens[batch.token_ids[start:end] < 0]  # a LAST_TOKEN belongs to the output
    output = np.append(p.output_ids[p.output_start[r] : p.output_start[r + 1]], pending)
    penalised = (p.repetition_penalty[r], p.presence_penalty[r], p.frequency_penalty[r])
    if penalised != (1, 0, 0):
        counts = np.bincount(output.astype(np.int64), minlength=len(logits))
        seen = counts > 0
        seen[prompt] = True
        factor = np.where(logits > 0, 1 / p.repetition_penalty[r], p.repetition_penalty[r])
        logits = np.where(seen, logits * factor, logits)
        logits -= p.presence_penalty[r] * (counts > 0) + p.frequency_penalty[r] * counts
    if batch.grammar_mask is not None:
        words = np.ascontiguousarray(batch.grammar_mask[r]).view(np.uint8)
        allowed = np.unpackbits(words, bitorder="little")[: len(logits)]
        logits[allowed == 0] = -np.inf
    if np.isneginf(logits).all():
        return -1
    if p.temperature[r] == 0:
        return int(logits.argmax())
    return draw(logits / p.temperature[r], p.top_k[r], p.top_p[r], p.min_p[r], p.uniform[r])


def draw(logits: np.ndarray, top_k: int, top_p: float, min_p: float, uniform: float) -> int:
    """Narrow to the top k, then the top p, then by min p; the exponential race decides."""
    order = best(logits, top_k or len(logits))
    probabilities = np.exp(log_softmax(logits[order]))
    keep = np.cumsum(probabilities) - probabilities < top_p
    keep &= probabilities >= min_p * probabilities[0]
    kept = np.sort(order[keep])  # the lowest id wins a tie
    race = np.exp(logits[kept] - logits.max()) / [variate(uniform, int(token)) for token in kept]
    return int(kept[race.argmax()])


def variate(uniform: float, token: int) -> float:
    """The token's standard exponential variate, hashed from the draw; plain Python integers."""
    bits = int(uniform * 2**53)
    word = scramble((token * 0x9E3779B9 + bits) % 2**32)
    word = scramble(word ^ (bits >> 32))
    return min(-math.log1p(-(word + 0.5) / 2**32), 22.0)


def scramble(word: int) -> int:
    word = (word ^ word >> 16) * 0x85EBCA6B % 2**32
    word = (word ^ word >> 13) * 0xC2B2AE35 % 2**32
    return word ^ word >> 16


def prompt_logprobs(batch: StepBatch, r: int, raw: np.ndarray) -> PromptLogprobs:
    """Of row r, whose raw logits at each of its positions are `raw` (n, V)."""
    if batch.prompt_targets is None:
        raise ValueError("PROMPT_LOGPROBS is wanted but prompt_targets is None")
    targets = batch.prompt_targets[batch.query_start[r] : batch.query_start[r + 1]]
    logs = log_softmax(raw[targets >= 0]).astype(np.float32)
    targets = targets[targets >= 0]
    top = best(logs, max(int(batch.sampling.logprobs[r]), 0)).astype(np.int32)
    values = np.take_along_axis(logs, top, -1)
    return PromptLogprobs(r, logs[np.arange(len(targets)), targets], top, values)
