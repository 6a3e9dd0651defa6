"""Guards common/random.py: the published Philox vectors, and draws that depend on seed and position
only."""

from __future__ import annotations

import numpy as np
import pytest

from sixfold.common.random import philox4x32, uniform

# Known-answer vectors of the Random123 library (kat_vectors, philox4x32 with 10 rounds):
# counter, key, result.
VECTORS = [
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def column(words: tuple[int, ...]) -> np.ndarray:
    return np.array(words, np.uint64)[:, None]


@pytest.mark.parametrize(("counter", "key", "result"), VECTORS)
def test_known_answers(
    counter: tuple[int, ...], key: tuple[int, ...], result: tuple[int, ...]
) -> None:
    assert philox4x32(column(counter), column(key))[:, 0].tolist() == list(result)


def test_known_answers_in_one_batch() -> None:
    counters = np.concatenate([column(v[0]) for v in VECTORS], 1)
    keys = np.concatenate([column(v[1]) for v in VECTORS], 1)
    assert philox4x32(counters, keys).T.tolist() == [list(v[2]) for v in VECTORS]


def test_a_draw_depends_on_seed_and_position_only() -> None:
    rng = np.random.default_rng(0)
    seeds = rng.integers(-(2**63), 2**63 - 1, 200)
    positions = rng.integers(0, 2**40, 200)
    together = uniform(seeds, positions)
    alone = [uniform(seeds[i : i + 1], positions[i : i + 1])[0] for i in range(200)]
    assert together.tolist() == alone
    shuffled = rng.permutation(200)
    assert uniform(seeds[shuffled], positions[shuffled]).tolist() == together[shuffled].tolist()


def test_the_draw_is_made_of_the_first_two_words_of_the_block() -> None:
    """A fixed value: a seed must mean the same in every release and on every platform."""
    words = philox4x32(column((7, 0, 0, 0)), column((42, 0)))[:, 0].tolist()
    assert uniform(np.array([42]), np.array([7]))[0] == (
        ((words[0] >> 5) * 2**26 + (words[1] >> 6)) / 2**53
    )
    assert uniform(np.array([42]), np.array([7]))[0] == 0.3583605096346558


def test_all_64_bits_of_the_seed_and_large_positions_matter() -> None:
    seeds = np.array([0, 1, -1, 2**32, 2**62, -(2**63)])
    assert len(set(uniform(seeds, np.zeros(6, np.int64)).tolist())) == 6
    positions = np.array([0, 1, 2**32, 2**40])
    assert len(set(uniform(np.zeros(4, np.int64), positions).tolist())) == 4


@pytest.mark.parametrize("along", ["seeds", "positions"])
def test_draws_are_uniform_and_uncorrelated(along: str) -> None:
    count = 100_000
    line, fixed = np.arange(count), np.full(count, 12345)
    draws = uniform(line, fixed) if along == "seeds" else uniform(fixed, line)
    assert draws.dtype == np.float64
    assert draws.min() >= 0
    assert draws.max() < 1
    share = np.histogram(draws, 100, (0, 1))[0]
    chi2 = float(((share - count / 100) ** 2).sum() / (count / 100))
    assert 50 < chi2 < 160  # 99 degrees of freedom
    assert abs(np.corrcoef(draws[1:], draws[:-1])[0, 1]) < 0.015


def test_an_empty_step_draws_nothing() -> None:
    assert uniform(np.empty(0, np.int64), np.empty(0, np.int64)).shape == (0,)
