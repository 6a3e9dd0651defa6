"""Counter-based random draws: the same (seed, position) gives the same number on every platform,
whatever else is in the batch.

Philox-4x32 with 10 rounds: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2,
3" (SC 2011), section 3.3. It has no state: a draw is a function of its key and its counter.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]

ROUNDS = 10
_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
_WEYL = np.array([[0x9E3779B9], [0xBB67AE85]], dtype=np.uint64)
_ROUND_KEYS = np.arange(ROUNDS, dtype=np.uint64)[:, None, None] * _WEYL  # (rounds, 2, 1)
_LOW = np.uint64(0xFFFFFFFF)
_WORD = np.uint64(32)


def philox4x32(counter: U64, key: U64) -> U64:
    """counter (4, N), key (2, N), each entry a 32-bit word -> (4, N) random 32-bit words."""
    keys = (key + _ROUND_KEYS) & _LOW
    even, odd = counter[0::2], counter[1::2]  # words 0 and 2 are multiplied, 1 and 3 are mixed in
    for round_key in keys:
        product = even * _MULTIPLIERS
        even = (product >> _WORD)[::-1] ^ odd ^ round_key
        odd = (product & _LOW)[::-1]
    words = np.empty_like(counter)
    words[0::2], words[1::2] = even, odd
    return words


def uniform(seeds: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """One draw in [0, 1) with 53 random bits per (seed, position) pair; both arrays are (N,).

    The seed is the key; the position is the low half of the counter, the high half is zero.
    """
    key = seeds.astype(np.int64, copy=False).view(np.uint64)
    place = positions.astype(np.int64, copy=False).view(np.uint64)
    counter = np.zeros((4, len(key)), dtype=np.uint64)
    counter[0], counter[1] = place & _LOW, place >> _WORD
    words = philox4x32(counter, np.stack([key & _LOW, key >> _WORD]))
    high, low = words[0] >> np.uint64(5), words[1] >> np.uint64(6)
    return (high * 67108864.0 + low) * 2.0**-53
