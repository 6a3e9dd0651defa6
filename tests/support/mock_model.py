"""The mock executor's "model", a hash of what it reads, and its oracle `alone`: the same without
pages, batches or steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sixfold.common.sampling import SamplingParams
from sixfold.platforms.interface import ExecutorInfo
from sixfold.platforms.interface_kv import KVGroup, KVKind
from sixfold.platforms.interface_step import SamplingArrays

U64 = np.uint64
_FACTOR = 0xD1342543DE82EF95  # odd, so that it has an inverse modulo 2**64
_POWERS = np.cumprod(np.full(4096, _FACTOR, U64), dtype=U64)
_INVERSES = np.cumprod(np.full(4096, pow(_FACTOR, -1, 2**64), U64), dtype=U64)


def mix(x: Any) -> Any:
    """splitmix64's finaliser (Steele, Lea, Flood 2014), on uint64 arrays."""
    x = np.asarray(x, U64)
    with np.errstate(over="ignore"):
        x = (x ^ (x >> U64(30))) * U64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> U64(27))) * U64(0x94D049BB133111EB)
    return x ^ (x >> U64(31))


def embed(tokens: Any, positions: Any) -> Any:
    with np.errstate(over="ignore"):
        return mix(np.asarray(tokens, U64) * U64(0x9E3779B97F4A7C15) + np.asarray(positions, U64))


def scan(before: Any, values: Any) -> Any:
    """(n,) states s = s * _FACTOR + v from `before` on: each depends on all values and their order.
    Written out as a sum, which numpy does at once."""
    n = len(values)
    with np.errstate(over="ignore"):
        return _POWERS[:n] * (before + np.cumsum(_INVERSES[:n] * values, dtype=U64))


def attend(values: Any, queries: Any, groups: Sequence[KVGroup]) -> Any:
    """values[g] (L,) of the context, of a recurrent group the states after each token; queries (n,)
    positions -> (n,) what they see, all groups."""
    seen = np.zeros(len(queries), U64)
    with np.errstate(over="ignore"):
        for g, spec in enumerate(groups):
            if spec.kind is KVKind.RECURRENT:
                seen += mix(values[g][queries] + U64(g))
                continue
            sums = np.concatenate([np.zeros(1, U64), np.cumsum(values[g], dtype=U64)])
            low = np.maximum(0, queries - spec.window + 1) if spec.window else 0 * queries
            seen += mix(sums[queries + 1] - sums[low] + U64(g))
    return mix(seen)


def logits_of(hidden: Any, vocab: int) -> Any:
    """(n,) -> (n, vocab) float32 in [0, 6)."""
    with np.errstate(over="ignore"):
        bits = mix(np.asarray(hidden, U64)[:, None] + np.arange(1, vocab + 1, dtype=U64))
    return ((bits >> U64(40)).astype(np.float64) * (6 / 2**24)).astype(np.float32)


def log_softmax(logits: Any) -> Any:
    top = logits.max(-1, keepdims=True)
    return (logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))).astype(np.float32)


@dataclass(frozen=True)
class RowSampling:
    """One row's line of SamplingArrays."""

    temperature: Any
    top_k: int
    top_p: Any
    min_p: Any
    repetition: Any
    presence: Any
    frequency: Any
    bias_ids: Any
    bias_values: Any
    prompt: Any
    output: Any
    uniform: float

    def choose(self, logits: Any) -> int:
        scores = logits.astype(np.float64)
        np.add.at(scores, self.bias_ids, self.bias_values.astype(np.float64))
        counts = np.bincount(self.output, minlength=len(scores))
        seen = (counts > 0) | (np.bincount(self.prompt, minlength=len(scores)) > 0)
        factor = np.where(scores > 0, 1 / self.repetition, self.repetition)
        scores = np.where(seen, scores * factor, scores)
        scores = scores - self.presence * (counts > 0) - self.frequency * counts
        if self.temperature == 0:
            return int(np.argmax(scores))
        p = np.exp((scores - scores.max()) / self.temperature)
        order = np.argsort(-p, kind="stable")
        keep = np.zeros(len(p), bool)
        keep[order[: self.top_k or len(p)]] = True
        p = np.where(keep, p, 0) / p[keep].sum()
        before = np.cumsum(p[order]) - p[order]
        keep[order[before >= self.top_p]] = False
        keep &= p >= self.min_p * p.max()
        p = np.where(keep, p, 0)
        return int(np.searchsorted(np.cumsum(p), self.uniform * p.sum(), side="right"))


def row_sampling(s: SamplingArrays, row: int, pending: int | None) -> RowSampling:
    def part(start: Any, values: Any) -> Any:
        return values[start[row] : start[row + 1]]

    output = part(s.output_start, s.output_ids)
    penalised = (s.repetition_penalty[row], s.presence_penalty[row], s.frequency_penalty[row]) != (
        1,
        0,
        0,
    )
    if pending is not None and penalised:
        output = np.append(output, pending)
    return RowSampling(
        np.float64(s.temperature[row]),
        int(s.top_k[row]),
        np.float64(s.top_p[row]),
        np.float64(s.min_p[row]),
        np.float64(s.repetition_penalty[row]),
        np.float64(s.presence_penalty[row]),
        np.float64(s.frequency_penalty[row]),
        part(s.bias_start, s.bias_ids),
        part(s.bias_start, s.bias_values),
        part(s.prompt_start, s.prompt_ids),
        output.astype(np.int64),
        float(s.uniform[row]),
    )


@dataclass(frozen=True)
class Alone:
    """What one request gives without cache, batch or steps."""

    tokens: list[int]
    finish_reason: str
    stop_token: int | None
    logprobs: list[float]
    prompt_logprobs: list[float]


def alone(
    prompt: list[int],
    params: SamplingParams,
    info: ExecutorInfo,
    eos: Iterable[int] = (),
    draw: Any = None,
    see: Any = None,
) -> Alone:
    """draw(seed, position) -> float: the generator under test has its own tests. see(tokens) gives
    what the first layer sees of them, where it is not `embed`."""
    see = see or (lambda tokens: embed(tokens, np.arange(len(tokens))))
    groups, vocab = info.groups, info.vocab_size
    hidden = np.zeros(0, U64)

    def read(tokens: list[int]) -> Any:
        nonlocal hidden
        new, hidden = len(tokens) - len(hidden), _hidden(see(tokens), len(hidden), hidden, groups)
        return logits_of(_last_layer(hidden, groups, new), vocab)

    return follow(read, prompt, params, info, eos, draw)


Choice = Callable[[RowSampling, Any], int]
"""The token that a row's parameters choose from its logits (vocabulary,)."""


def follow(
    read: Callable[[list[int]], Any],
    prompt: list[int],
    params: SamplingParams,
    info: ExecutorInfo,
    eos: Iterable[int] = (),
    draw: Any = None,
    choose: Choice = RowSampling.choose,
) -> Alone:
    """One request to its end. read(tokens) gives the logits (n, vocabulary) behind the last n of
    `tokens`, those that it had not been given before."""
    stops = set(params.stop_token_ids) | (set() if params.ignore_eos else set(eos))
    full = [g.pages - 1 for g in info.groups if g.kind is KVKind.FULL]
    capacity = min(full, default=10**9) * info.page_size
    limit = len(prompt) + params.max_tokens if params.max_tokens else info.max_context
    limit = min(limit, capacity + 1)
    tokens, scores = list(prompt), []
    logits = read(tokens)
    known = [float(log_softmax(logits)[i, t]) for i, t in enumerate(prompt[1:])]
    while True:
        row = _row(params, stops, prompt, tokens[len(prompt) :], draw)
        choice = choose(row, logits[-1])
        if choice in stops:
            return Alone(tokens[len(prompt) :], "stop", choice, scores, known)
        scores.append(float(log_softmax(logits[-1:])[0, choice]))
        tokens.append(choice)
        if len(tokens) >= limit:
            return Alone(tokens[len(prompt) :], "length", None, scores, known)
        logits = read(tokens)


def _row(
    params: SamplingParams, stops: set[int], prompt: list[int], made: list[int], draw: Any
) -> RowSampling:
    bias = dict(params.logit_bias)
    if len(made) < params.min_tokens:
        bias.update(dict.fromkeys(stops, -np.inf))
    return RowSampling(
        np.float64(np.float32(params.temperature)),
        params.top_k,
        np.float64(np.float32(params.top_p)),
        np.float64(np.float32(params.min_p)),
        np.float64(np.float32(params.repetition_penalty)),
        np.float64(np.float32(params.presence_penalty)),
        np.float64(np.float32(params.frequency_penalty)),
        np.array(list(bias), np.int64),
        np.array(list(bias.values()), np.float32),
        np.array(prompt, np.int64),
        np.array(made, np.int64),
        draw(params.seed, len(prompt) + len(made)) if draw and params.temperature else 0.0,
    )


def _hidden(first: Any, start: int, before: Any, groups: Sequence[KVGroup]) -> Any:
    new = attend(_context(first, groups), np.arange(start, len(first)), groups)
    return np.concatenate([np.asarray(before, U64), new])


def _last_layer(hidden: Any, groups: Sequence[KVGroup], new: int) -> Any:
    queries = np.arange(len(hidden) - new, len(hidden))
    return attend(_context(hidden, groups), queries, groups)


def _context(values: Any, groups: Sequence[KVGroup]) -> list[Any]:
    return [scan(U64(0), values) if g.kind is KVKind.RECURRENT else values for g in groups]
