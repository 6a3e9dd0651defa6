"""Writing new keys and values into paged storage, and copying pages. Both work in place: a kernel
changes its first arguments and returns them; the references return changed copies."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from ...platforms.interface_kernels import Case, Op
from .contract import EXACT, F32, I64, normal


def kv_write(keys: F32, values: F32, slots: I64, k: F32, v: F32) -> tuple[F32, F32]:
    """keys, values (S, H, D) storage by slot = page * page_size + offset, any strides; slots (T,)
    int; k, v (T, H, D) -> the storage with k and v at the slots.

    Slots are distinct, except those of the null page (slots below the page size), which may repeat
    and whose content afterwards is undefined.
    """
    keys, values = keys.copy(), values.copy()
    keys[slots], values[slots] = k, v
    return keys, values


def to_int8_rows(x: F32) -> NDArray[np.int8]:
    """x (..., dim) -> (..., dim + 4), a cache's form in eight bits: whole steps of a 127th of a
    row's largest magnitude, then that step as a float32. NaN becomes 0 steps, its row's step NaN.
    """
    step = np.abs(x).max(-1, keepdims=True) / np.float32(127)
    q = np.nan_to_num(np.rint(x / np.where(step > 0, step, 1))).astype(np.int8)
    return np.concatenate((q, step.astype("<f4").view(np.int8)), -1)


def from_int8_rows(rows: NDArray[np.int8]) -> F32:
    """(..., dim + 4) -> the numbers (..., dim) that a cache in eight bits holds."""
    step = np.ascontiguousarray(rows[..., -4:]).view("<f4")
    return np.asarray(rows[..., :-4].astype(np.float32) * step, np.float32)


def page_copy(pool: F32, sources: I64, targets: I64) -> F32:
    """pool (layers, pages, ...); sources, targets (n,) int -> the pool with page targets[i]
    holding what sources[i] held before the call, in every layer. Targets are distinct."""
    result = pool.copy()
    result[:, targets] = pool[:, sources]
    return result


def kv_write_cases(rng: np.random.Generator) -> Iterable[Case]:
    for name, slots, heads, dim, tokens in [
        ("one_token", 16, 3, 64, 1),
        ("shuffled", 128, 1, 80, 50),
        ("every_slot", 24, 2, 16, 24),
        ("no_tokens", 8, 2, 16, 0),
    ]:
        yield Case(
            name,
            {
                "keys": normal(rng, slots, heads, dim),
                "values": normal(rng, slots, heads, dim),
                "slots": rng.permutation(slots)[:tokens].astype(np.int64),
                "k": normal(rng, tokens, heads, dim),
                "v": normal(rng, tokens, heads, dim),
            },
        )


def page_copy_cases(rng: np.random.Generator) -> Iterable[Case]:
    for name, sources, targets in [
        ("one", [1], [2]),
        ("fan_out", [3, 3, 1], [4, 5, 6]),
        ("swap", [1, 2], [2, 1]),
        ("chain_reads_first", [1, 2, 3], [2, 3, 4]),
        ("none", [], []),
    ]:
        yield Case(
            name,
            {
                "pool": normal(rng, 3, 7, 4, 2, 2, 16),
                "sources": np.array(sources, np.int64),
                "targets": np.array(targets, np.int64),
            },
        )


OPS = (
    Op("kv_write", kv_write, kv_write_cases, EXACT, in_place=frozenset({"keys", "values"})),
    Op("page_copy", page_copy, page_copy_cases, EXACT, in_place=frozenset({"pool"})),
)
