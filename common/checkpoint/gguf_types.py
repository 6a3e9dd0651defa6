"""The storage types of GGUF: block sizes and exact conversion to float32 with numpy.

Layouts are those of ggml's block structures (ggml-common.h). Each converter takes the raw blocks
(n, bytes) uint8 and fills `out` (n, elements) float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class BlockType:
    name: str
    elements: int  # per block
    nbytes: int  # per block
    convert: Callable[[U8, F32], None]


def half(blocks: U8, at: int) -> F32:
    """The fp16 number at byte `at` of every block, as (n, 1) float32."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _f32(blocks: U8, out: F32) -> None:
    out[:] = blocks.view("<f4")


def _f16(blocks: U8, out: F32) -> None:
    out[:] = blocks.view("<f2")


def _bf16(blocks: U8, out: F32) -> None:
    bits = out.view(np.uint32)
    bits[:] = blocks.view("<u2")
    np.left_shift(bits, 16, out=bits)


def nibbles(packed: U8, out: NDArray[Any]) -> None:
    """Low nibbles to the first half of `out`'s last axis, high nibbles to the second."""
    half = packed.shape[-1]
    np.bitwise_and(packed, 15, out=out[..., :half], casting="unsafe")
    np.right_shift(packed, 4, out=out[..., half:], casting="unsafe")


def _q8_0(blocks: U8, out: F32) -> None:
    np.multiply(blocks[:, 2:].view(np.int8), half(blocks, 0), out=out)


def _q4_0(blocks: U8, out: F32) -> None:
    nibbles(blocks[:, 2:], out)
    out -= 8
    out *= half(blocks, 0)


def _q4_1(blocks: U8, out: F32) -> None:
    nibbles(blocks[:, 4:], out)
    out *= half(blocks, 0)
    out += half(blocks, 2)


def five_bits(blocks: U8, high_at: int) -> U8:
    """(n, 32) five-bit numbers: four high-bit bytes at `high_at`, then 16 bytes of nibbles."""
    high = np.unpackbits(blocks[:, high_at : high_at + 4], axis=1, bitorder="little")
    low = np.empty_like(high)
    nibbles(blocks[:, high_at + 4 :], low)
    high <<= 4
    return np.bitwise_or(low, high, out=low)


def _q5_0(blocks: U8, out: F32) -> None:
    out[:] = five_bits(blocks, 2)
    out -= 16
    out *= half(blocks, 0)


def _q5_1(blocks: U8, out: F32) -> None:
    out[:] = five_bits(blocks, 4)
    out *= half(blocks, 0)
    out += half(blocks, 2)


def k_scales(blocks: U8) -> tuple[F32, F32]:
    """Scales and minimums (n, 8, 1) of Q4_K and Q5_K: eight 6-bit pairs packed in bytes 4..15."""
    first, second, third = (blocks[:, at : at + 4] for at in (4, 8, 12))
    scale = np.hstack([first & 63, (third & 15) | ((first >> 2) & 48)])
    minimum = np.hstack([second & 63, (third >> 4) | ((second >> 2) & 48)])
    return (
        (half(blocks, 0) * scale.astype(np.float32))[:, :, None],
        (half(blocks, 2) * minimum.astype(np.float32))[:, :, None],
    )


def _q4_k(blocks: U8, out: F32) -> None:
    count = len(blocks)
    scale, minimum = k_scales(blocks)
    nibbles(blocks[:, 16:].reshape(count, 4, 32), out.reshape(count, 4, 64))
    values = out.reshape(count, 8, 32)
    values *= scale
    values -= minimum


def _q5_k(blocks: U8, out: F32) -> None:
    count = len(blocks)
    scale, minimum = k_scales(blocks)
    bits = np.empty((count, 8, 32), np.uint8)
    nibbles(blocks[:, 48:].reshape(count, 4, 32), bits.reshape(count, 4, 64))
    shifts = np.arange(8, dtype=np.uint8)[None, :, None]
    bits |= ((blocks[:, None, 16:48] >> shifts) & 1) << 4
    values = out.reshape(count, 8, 32)
    np.multiply(bits, scale, out=values)
    values -= minimum


def six_bits(blocks: U8) -> tuple[NDArray[np.int8], F32]:
    """Q6_K's numbers (n, 16, 16) from -32 to 31 and their scales (n, 16)."""
    count = len(blocks)
    low = blocks[:, :128].reshape(count, 2, 1, 64) >> np.array([0, 4], np.uint8)[:, None]
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    high = blocks[:, 128:192].reshape(count, 2, 1, 32) >> shifts
    bits = (low & 15).reshape(count, 8, 32) | ((high & 3) << 4).reshape(count, 8, 32)
    scale = half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return bits.view(np.int8).reshape(count, 16, 16) - np.int8(32), scale


def _q6_k(blocks: U8, out: F32) -> None:
    numbers, scale = six_bits(blocks)
    np.multiply(numbers, scale[:, :, None], out=out.reshape(numbers.shape))


SUPPORTED: dict[int, BlockType] = {
    0: BlockType("F32", 1, 4, _f32),
    1: BlockType("F16", 1, 2, _f16),
    2: BlockType("Q4_0", 32, 18, _q4_0),
    3: BlockType("Q4_1", 32, 20, _q4_1),
    6: BlockType("Q5_0", 32, 22, _q5_0),
    7: BlockType("Q5_1", 32, 24, _q5_1),
    8: BlockType("Q8_0", 32, 34, _q8_0),
    12: BlockType("Q4_K", 256, 144, _q4_k),
    13: BlockType("Q5_K", 256, 176, _q5_k),
    14: BlockType("Q6_K", 256, 210, _q6_k),
    30: BlockType("BF16", 1, 2, _bf16),
}

_OTHERS = {
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS",
    19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16",
    26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip


def type_name(kind: int) -> str:
    """The type's name in ggml, or its number when it is not known."""
    known = SUPPORTED.get(kind)
    return known.name if known else _OTHERS.get(kind, f"type {kind}")


def supported_names() -> str:
    return " ".join(block.name for block in SUPPORTED.values())
