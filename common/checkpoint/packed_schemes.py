"""How quantised matrices lie in a directory's tensors, one scheme per format: which tensors make up
a matrix, their shapes and types, and how they are taken apart.

GPTQ    as AutoGPTQ and GPTQModel write it ("gptq", whose zeros are stored less one, and "gptq_v2")
AWQ     as AutoAWQ writes it, version "gemm"
Compressed    as compressed-tensors writes it, "int-quantized" and "pack-quantized"
Described     as msModelSlim writes it, type "W8A8_DYNAMIC" of quant_model_description.json
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .grouped_matrix import U8, GroupedMatrix

Shape = tuple[int, ...]
Arrays = Mapping[str, NDArray[Any]]

WORDS, BYTES, SIZES, SCALES = ("I32",), ("I8",), ("I64",), ("F16", "BF16", "F32")


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of a matrix."""

    shape: Shape
    types: tuple[str, ...]
    optional: bool = False


class PackedScheme(Protocol):
    @property
    def name(self) -> str:
        """As kernels know it; one of PACKED."""
        ...

    @property
    def marker(self) -> tuple[str, tuple[str, ...]]:
        """Last name and types of the tensor that every packed matrix has."""
        ...

    def size(self, marker: Shape, stated: Shape | None) -> tuple[int, int]:
        """(outputs, inputs) by the marker's shape; `stated` is what a `weight_shape` says."""
        ...

    def parts(self, outputs: int, inputs: int) -> dict[str, Part]: ...

    def matrix(self, arrays: Arrays, outputs: int, inputs: int) -> GroupedMatrix:
        """`arrays` has the parts; scales are float32. Raises ValueError."""
        ...


_AWQ_OUTPUTS = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs each nibble of a word belongs to, lowest nibble first."""

PACKED = frozenset(
    "gptq_int4 gptq_int8 awq_int4 int8_channel int8_token int8_group packed_int4 packed_int8"
    "".split()
)
"""Names of the schemes."""


@dataclass(frozen=True, slots=True)
class GPTQ:
    """Words of 32 bits along the inputs, lowest bits first: qweight (inputs * bits / 32, outputs),
    qzeros (groups, outputs * bits / 32), scales (groups, outputs), g_idx (inputs,)."""

    bits: int
    group_size: int  # -1: all inputs
    zero_offset: int  # what is added to a stored zero
    reordered: bool  # desc_act: g_idx is not i // group_size

    @property
    def name(self) -> str:
        return f"gptq_int{self.bits}"

    @property
    def marker(self) -> tuple[str, tuple[str, ...]]:
        return "qweight", WORDS

    def size(self, marker: Shape, stated: Shape | None) -> tuple[int, int]:
        words, outputs = marker
        return outputs, words * 32 // self.bits

    def parts(self, outputs: int, inputs: int) -> dict[str, Part]:
        groups = _groups(inputs, self.group_size)
        return {
            "qweight": Part((inputs * self.bits // 32, outputs), WORDS),
            "qzeros": Part((groups, outputs * self.bits // 32), WORDS),
            "scales": Part((groups, outputs), SCALES),
            "g_idx": Part((inputs,), WORDS, optional=not self.reordered),
        }

    def matrix(self, arrays: Arrays, outputs: int, inputs: int) -> GroupedMatrix:
        stored = _unpack(arrays["qzeros"], self.bits).T.astype(np.int16)
        return GroupedMatrix(
            self.bits,
            _unpack(arrays["qweight"].T, self.bits),
            (stored + np.int16(self.zero_offset)) & np.int16((1 << self.bits) - 1),
            np.ascontiguousarray(arrays["scales"].T),
            _group_of(arrays.get("g_idx"), inputs, self.group_size),
        )


@dataclass(frozen=True, slots=True)
class AWQ:
    """Four bits, words along the outputs: qweight (inputs, outputs / 8), qzeros (groups, outputs /
    8), scales (groups, outputs)."""

    group_size: int

    @property
    def name(self) -> str:
        return "awq_int4"

    @property
    def marker(self) -> tuple[str, tuple[str, ...]]:
        return "qweight", WORDS

    def size(self, marker: Shape, stated: Shape | None) -> tuple[int, int]:
        inputs, words = marker
        return words * 8, inputs

    def parts(self, outputs: int, inputs: int) -> dict[str, Part]:
        groups = _groups(inputs, self.group_size)
        return {
            "qweight": Part((inputs, outputs // 8), WORDS),
            "qzeros": Part((groups, outputs // 8), WORDS),
            "scales": Part((groups, outputs), SCALES),
        }

    def matrix(self, arrays: Arrays, outputs: int, inputs: int) -> GroupedMatrix:
        return GroupedMatrix(
            4,
            _awq_numbers(arrays["qweight"]),
            _awq_numbers(arrays["qzeros"]).astype(np.int16),
            np.ascontiguousarray(arrays["scales"].T),
            _group_of(None, inputs, self.group_size),
        )


@dataclass(frozen=True, slots=True)
class Compressed:
    """Signed numbers: as bytes, weight (outputs, inputs); or `packed` in words along the inputs,
    half of 2 ** bits added, weight_packed (outputs, inputs * bits / 32) with weight_shape (2,).
    weight_scale (outputs, groups), or (1,) with `one_scale`; weight_zero_point alike, packed along
    the outputs in the packed form."""

    bits: int
    packed: bool
    group_size: int
    symmetric: bool
    one_scale: bool = False
    by_token: bool = False  # activations are to be rounded to eight bits, a scale per token

    @property
    def name(self) -> str:
        if self.packed:
            return f"packed_int{self.bits}"
        if self.group_size != -1:
            return "int8_group"
        return "int8_token" if self.by_token and self.symmetric else "int8_channel"

    @property
    def marker(self) -> tuple[str, tuple[str, ...]]:
        return ("weight_packed", WORDS) if self.packed else ("weight", BYTES)

    def size(self, marker: Shape, stated: Shape | None) -> tuple[int, int]:
        outputs, inputs = stated or marker
        return outputs, inputs

    def parts(self, outputs: int, inputs: int) -> dict[str, Part]:
        groups = _groups(inputs, self.group_size)
        scale: Shape = (1,) if self.one_scale else (outputs, groups)
        if not self.packed:
            return {
                "weight": Part((outputs, inputs), BYTES),
                "weight_scale": Part(scale, SCALES),
                "weight_zero_point": Part(scale, BYTES, optional=self.symmetric),
            }
        parts = {
            "weight_packed": Part((outputs, _words(inputs, self.bits)), WORDS),
            "weight_shape": Part((2,), SIZES),
            "weight_scale": Part(scale, SCALES),
            "weight_g_idx": Part((inputs,), WORDS, optional=True),
        }
        if not self.symmetric:
            parts["weight_zero_point"] = Part((_words(outputs, self.bits), groups), WORDS)
        return parts

    def matrix(self, arrays: Arrays, outputs: int, inputs: int) -> GroupedMatrix:
        middle = 1 << (self.bits - 1)
        scale = arrays["weight_scale"]
        if self.one_scale:
            scale = np.broadcast_to(scale, (outputs, 1))
        zero = np.full(scale.shape, middle, np.int16)
        point = arrays.get("weight_zero_point")
        if self.packed:
            q = _unpack(arrays["weight_packed"], self.bits)[:, :inputs]
            if point is not None:
                zero = _unpack(point.T, self.bits)[:, :outputs].T.astype(np.int16)
        else:
            q = arrays["weight"].view(np.uint8) ^ np.uint8(middle)
            if point is not None:
                zero += point
        group = _group_of(arrays.get("weight_g_idx"), inputs, self.group_size)
        return GroupedMatrix(self.bits, q, zero, np.ascontiguousarray(scale), group)


@dataclass(frozen=True, slots=True)
class Described:
    """Bytes with a scale per output and activations of eight bits, a scale per token: weight
    (outputs, inputs), weight_scale and weight_offset (outputs, 1). Offsets are zero: the type is
    symmetric (pages of msModelSlim, "AscendV1")."""

    @property
    def name(self) -> str:
        return "int8_token"

    @property
    def marker(self) -> tuple[str, tuple[str, ...]]:
        return "weight", BYTES

    def size(self, marker: Shape, stated: Shape | None) -> tuple[int, int]:
        outputs, inputs = marker
        return outputs, inputs

    def parts(self, outputs: int, inputs: int) -> dict[str, Part]:
        return {
            "weight": Part((outputs, inputs), BYTES),
            "weight_scale": Part((outputs, 1), SCALES),
            "weight_offset": Part((outputs, 1), SCALES, optional=True),
        }

    def matrix(self, arrays: Arrays, outputs: int, inputs: int) -> GroupedMatrix:
        offset = arrays.get("weight_offset")
        if offset is not None and offset.any():
            raise ValueError("has offsets beside it that are not zero; supported: symmetric bytes")
        q = arrays["weight"].view(np.uint8) ^ np.uint8(128)
        scale = np.ascontiguousarray(arrays["weight_scale"])
        zero = np.full(scale.shape, 128, np.int16)
        return GroupedMatrix(8, q, zero, scale, _group_of(None, inputs, -1))


def _groups(inputs: int, group_size: int) -> int:
    return 1 if group_size == -1 else -(-inputs // group_size)


def _words(count: int, bits: int) -> int:
    return -(-count * bits // 32)


def _group_of(stored: NDArray[Any] | None, inputs: int, size: int) -> NDArray[np.int64]:
    if stored is None:
        return np.arange(inputs, dtype=np.int64) // (inputs if size == -1 else size)
    groups = _groups(inputs, size)
    if len(stored) and (stored.min() < 0 or stored.max() >= groups):
        raise ValueError(f"names groups outside the {groups} that there are")
    return stored.astype(np.int64)


def _unpack(words: NDArray[Any], bits: int) -> U8:
    """(..., n) words -> (..., 32 / bits * n) numbers, lowest bits first."""
    # Little-endian words are their bytes in order.
    packed = np.ascontiguousarray(words).astype("<u4", copy=False).view(np.uint8)
    if bits == 8:
        return packed
    out = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.uint8)
    np.bitwise_and(packed, 15, out=out[..., 0::2])
    np.right_shift(packed, 4, out=out[..., 1::2])
    return out


def _awq_numbers(words: NDArray[Any]) -> U8:
    """(rows, outputs / 8) words -> (outputs, rows) numbers."""
    turned = np.ascontiguousarray(words.T).view(np.uint32)
    numbers = np.empty((len(turned), 8, turned.shape[1]), np.uint8)
    for nibble, output in enumerate(_AWQ_OUTPUTS):
        stored = (turned >> np.uint32(4 * nibble)) & np.uint32(15)
        numbers[:, output] = stored
    return numbers.reshape(-1, turned.shape[1])
