"""Seeds of sampled requests: every request has one, given or drawn."""

from __future__ import annotations

import secrets


def random_seed() -> int:
    return secrets.randbits(63)


def nth_seed(seed: int, n: int) -> int:
    """The seed of the n-th choice, kept within 64 bits."""
    return (seed + n + 2**63) % 2**64 - 2**63
