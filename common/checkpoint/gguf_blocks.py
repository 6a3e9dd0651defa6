"""GGUF's quantised blocks taken apart and not converted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .gguf_types import BlockType, five_bits, half, k_scales, nibbles, six_bits
from .quantised_rows import F32, GROUP, QuantisedRows

U8 = NDArray[np.uint8]

Parts = tuple[NDArray[Any], F32, F32 | None]


def _q4_0(blocks: U8) -> Parts:
    return _four_bits(blocks[:, 2:]), half(blocks, 0), None


def _q4_1(blocks: U8) -> Parts:
    return _four_bits(blocks[:, 4:]), half(blocks, 0), -half(blocks, 2)


def _q5_0(blocks: U8) -> Parts:
    return five_bits(blocks, 2).view(np.int8) - np.int8(16), half(blocks, 0), None


def _q5_1(blocks: U8) -> Parts:
    return five_bits(blocks, 4).view(np.int8), half(blocks, 0), -half(blocks, 2)


def _q8_0(blocks: U8) -> Parts:
    return blocks[:, 2:].view(np.int8), half(blocks, 0), None


def _q4_k(blocks: U8) -> Parts:
    scale, minimum = k_scales(blocks)
    return _four_bits(blocks[:, 16:].reshape(-1, 4, 32)), scale, minimum


def _q5_k(blocks: U8) -> Parts:
    scale, minimum = k_scales(blocks)
    bits = _four_bits(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    shifts = np.arange(8, dtype=np.uint8)[None, :, None]
    bits |= ((blocks[:, None, 16:48] >> shifts) & 1) << 4
    return bits.view(np.int8), scale, minimum


def _q6_k(blocks: U8) -> Parts:
    numbers, scale = six_bits(blocks)
    return numbers, scale, None


def _four_bits(packed: U8) -> U8:
    out = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.uint8)
    nibbles(packed, out)
    return out


_PARTS: dict[str, tuple[int, Callable[[U8], Parts]]] = {
    "Q4_0": (4, _q4_0),
    "Q4_1": (4, _q4_1),
    "Q4_K": (4, _q4_k),
    "Q5_0": (8, _q5_0),
    "Q5_1": (8, _q5_1),
    "Q5_K": (8, _q5_k),
    "Q6_K": (8, _q6_k),
    "Q8_0": (8, _q8_0),
}
SCHEMES = frozenset(name.lower() for name in _PARTS)
"""Names of the quantised types: "q4_0", ..."""


def take_apart(block: BlockType, raw: U8, rows: int) -> QuantisedRows:
    """raw: the bytes of `rows` whole rows of a quantised type."""
    bits, parts = _PARTS[block.name]
    q, scale, minimum = parts(raw.reshape(-1, block.nbytes))
    q = q.reshape(rows, -1, GROUP)
    return QuantisedRows(
        bits,
        q,
        scale.reshape(rows, -1),
        None if minimum is None else minimum.reshape(rows, -1),
        q.shape[1] * GROUP,
    )
