"""Matrices of small floats with a scale per block, as checkpoints store them: fp8 in squares, and
the microscaling format MXFP4 (Open Compute Project, OCP Microscaling Formats 1.0)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .quantised_rows import QuantisedRows

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

SQUARE = 128
"""Rows and columns of an fp8 block that share a scale; at the edges there are fewer."""
MX_GROUP = 32
"""Columns of a row that share an MXFP4 scale."""
MX_BIAS = 127
"""An e8m0 scale of byte b is 2 ** (b - 127); byte 255 is NaN."""


@dataclass(frozen=True, slots=True)
class Fp8Blocks:
    """value = e4m3(codes) * scales of its 128 x 128 block. codes (rows, columns) are OCP e4m3
    ("fn": largest 448, 0x7F and 0xFF are NaN), scales (ceil(rows/128), ceil(columns/128))."""

    codes: U8
    scales: F32

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.codes.shape
        return rows, columns

    def values(self) -> F32:
        rows, columns = self.shape
        values = E4M3.take(self.codes)
        for row in range(0, rows, SQUARE):
            wide = np.repeat(self.scales[row // SQUARE], SQUARE)[:columns]
            values[row : row + SQUARE] *= wide
        return values


@dataclass(frozen=True, slots=True)
class Mxfp4Rows:
    """value = e2m1(code) * 2 ** (scale - 127). codes (rows, columns / 2) hold two codes a byte, the
    even column in the low nibble; scales (rows, columns / 32) are e8m0 bytes."""

    codes: U8
    scales: U8

    @property
    def shape(self) -> tuple[int, int]:
        rows, pairs = self.codes.shape
        return rows, 2 * pairs

    def values(self) -> F32:
        scales = np.exp2(self.scales.astype(np.float32) - MX_BIAS)
        rows, columns = self.shape
        values = (
            _PAIRS.take(self.codes).view(np.float32).reshape(rows, columns // MX_GROUP, MX_GROUP)
        )
        values *= scales[..., None]
        return values.reshape(rows, columns)

    def rows(self, chosen: slice) -> Mxfp4Rows:
        """Some of the rows, copied."""
        return Mxfp4Rows(self.codes[chosen].copy(), self.scales[chosen].copy())


StoredMatrix = QuantisedRows | Fp8Blocks | Mxfp4Rows
"""A matrix in a form that a checkpoint stores it in, other than a dtype."""


def _e4m3() -> F32:
    code = np.arange(256)
    exponent, fraction = (code >> 3) & 15, code & 7
    normal = np.exp2(exponent - 7.0) * (1 + fraction / 8)
    magnitude = np.where(exponent == 0, 2.0**-6 * fraction / 8, normal)
    magnitude[(code & 127) == 127] = np.nan
    return np.where(code & 128, -magnitude, magnitude).astype(np.float32)


E4M3 = _e4m3()
"""Value of every byte."""
_HALVES = np.array([0, 1, 2, 3, 4, 6, 8, 12], np.float32) / 2
E2M1 = np.concatenate([_HALVES, -_HALVES])
"""Value of every nibble."""
# Both values of every byte as one number of 64 bits: a look-up a byte instead of one a nibble.
_PAIRS = np.stack([np.tile(E2M1, 16), np.repeat(E2M1, 16)], axis=-1).view(np.uint64).ravel()
