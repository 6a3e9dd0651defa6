"""Small models, small caches and crowds of requests over few prefixes, for tests of the engine."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from support.engine_traffic import EOS, Arrival, Oracle, draw, hashed
from support.mock_executor import group, mock_info, state
from support.mock_model import alone

from sixfold.common.sampling import SamplingParams
from sixfold.platforms.interface import ExecutorInfo
from sixfold.platforms.interface_kv import KVKind

VOCAB = 32
TOKENS = np.random.default_rng(7).integers(1, VOCAB, (3, 2048)).tolist()
# Groups: windows in tokens, relative to the page size in `world`; 0 = full attention.
STATE = 5  # a recurrent group
LATENT, COMPRESSED = 6, 7  # what the scheduler takes for full
RECURRENT_SHAPES = ((STATE,), (0, STATE), (STATE, 0, 2), (2, STATE), (0, STATE, STATE))
OTHER_SHAPES = ((LATENT,), (1, COMPRESSED, COMPRESSED, STATE, STATE))
SHAPES = ((0,), (0, 1), (0, 2), (0, 3), (2,), (0, 0), (0, 2, 4), *RECURRENT_SHAPES, *OTHER_SHAPES)
KINDS = {LATENT: KVKind.LATENT, COMPRESSED: KVKind.COMPRESSED}


def world(size: int, shape: tuple[int, ...], slack: int, context: int, **info: int) -> ExecutorInfo:
    """`slack`: how many pages there are beyond what the longest request needs alone, and how many
    state slots beyond one per row."""
    longest = -(-context // size)
    groups = []
    for i, kind in enumerate(shape):
        if kind == STATE:
            groups.append(state(f"g{i}", info.get("max_rows", 8) + slack, size))
            continue
        if kind in KINDS:
            full = group(f"g{i}", longest + slack, size)
            groups.append(replace(full, kind=KINDS[kind]))
            continue
        window = {0: 0, 1: 1, 2: size + 1, 3: 2 * size, 4: max(2, size // 2)}[kind]
        least = min(longest, (window + size - 2) // size + 1) if window else longest
        groups.append(group(f"g{i}", least + slack, size, window))
    return mock_info(groups, max_context=context, vocab_size=VOCAB, **info)


def prompt(base: int, shared: int, own: list[int]) -> list[int]:
    return (TOKENS[base][:shared] + own) or [1]


def crowd(
    rng: np.random.Generator,
    info: ExecutorInfo,
    count: int,
    span: int,
    oracle: Oracle = hashed,
) -> list[Arrival]:
    """Many requests over few prefixes, some of them the next turn of a talk: an earlier prompt, the
    answer it gets, and a little more."""
    context, result = info.max_context, list[Arrival]()
    for _ in range(count):
        own = rng.integers(0, VOCAB, rng.integers(0, 4)).tolist()
        text = prompt(int(rng.integers(3)), int(rng.integers(0, context * 2 // 3)), own)
        at = int(rng.integers(span))
        if result and rng.random() < 0.4:
            before = result[int(rng.integers(len(result)))]
            answer = oracle(before, info).tokens
            text = (before.prompt + answer + own)[: context - 4]
            at = before.at + int(rng.integers(150))
        params = SamplingParams(
            max_tokens=int(rng.integers(1, min(context - len(text), 150) + 1)),
            temperature=float(rng.integers(2)),
            seed=int(rng.integers(2**62)),
            ignore_eos=bool(rng.integers(2)),
        )
        gives_up = at + int(rng.integers(12)) if rng.random() < 0.15 else None
        result.append(Arrival(at, text, params, int(rng.integers(3)), gives_up))
    return result


def talk(info: ExecutorInfo, first: int) -> list[Arrival]:
    """Three turns, one after the other: each prompt goes on from the answer before."""
    params = SamplingParams(max_tokens=7, temperature=0.0, ignore_eos=True)
    text, result = TOKENS[0][:first], list[Arrival]()
    for turn in range(3):
        result.append(Arrival(60 * turn, text, params))
        text = text + alone(text, params, info, EOS, draw).tokens + [turn + 1, turn + 2]
    return result
