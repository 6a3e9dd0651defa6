"""Matrices of small floats in a directory's tensors, with the scales of their blocks beside them:
which tensors belong together, checked, and read by rows.

What a matrix is kept in is told by its tensor, not by the configuration: e4m3 with a scale per 128
x 128 (e8m0, float32 or bfloat16), or two e2m1 a byte with an e8m0 scale per 32 columns. Scales are
called `<module>.scale` or `<module>.weight_scale_inv`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from ..errors import CheckpointError
from .block_floats import F32, MX_BIAS, MX_GROUP, SQUARE, Fp8Blocks, Mxfp4Rows
from .safetensors_index import StoredTensor, read_array

Tables = Mapping[str, StoredTensor]

FP8, MXFP4 = "fp8_block", "mxfp4"
"""Names of the schemes, as kernels know them."""
_SCHEMES = {"F8_E4M3": FP8, "I8": MXFP4, "U8": MXFP4}
_SCALES = {FP8: ("F8_E8M0", "F32", "BF16"), MXFP4: ("F8_E8M0", "U8")}
_SUFFIXES = (".scale", ".weight_scale_inv")


@dataclass(frozen=True, slots=True)
class BlockMatrix:
    """One matrix, not read yet."""

    scheme: str
    weight: StoredTensor
    scale: StoredTensor

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.weight.shape
        return rows, columns * (2 if self.scheme == MXFP4 else 1)

    @property
    def where(self) -> str:
        return f"{self.weight.file}: tensor {self.weight.name!r}"

    @property
    def rows_at_once(self) -> int:
        """Rows that share scales, so that reading begins at a multiple of them."""
        return SQUARE if self.scheme == FP8 else 1

    def read(self) -> Fp8Blocks | Mxfp4Rows:
        return self.rows(0, self.shape[0])

    def rows(self, start: int, stop: int) -> Fp8Blocks | Mxfp4Rows:
        """Rows start .. stop; start must be a multiple of `rows_at_once`."""
        codes = read_array(_rows_of(self.weight, start, stop)).view(np.uint8)
        if self.scheme == MXFP4:
            return Mxfp4Rows(codes, read_array(_rows_of(self.scale, start, stop)))
        scales = read_array(_rows_of(self.scale, start // SQUARE, -(-stop // SQUARE)))
        return Fp8Blocks(codes, _numbers(scales) if self.scale.dtype == "F8_E8M0" else scales)


def find_blocks(tables: Tables) -> dict[str, BlockMatrix]:
    """Tensor name -> its matrix, for every tensor with scales beside it. Raises CheckpointError
    where they do not fit, and for small floats without scales."""
    found = {}
    for name, tensor in tables.items():
        module, _, last = name.rpartition(".")
        scheme = _SCHEMES.get(tensor.dtype)
        if last != "weight" or scheme is None or len(tensor.shape) != 2:
            continue
        names = [f"{module}{suffix}" for suffix in _SUFFIXES]
        scale = next((tables[n] for n in names if n in tables), None)
        if scale is None:
            raise CheckpointError(
                f"{tensor.file}: tensor {name!r} of type {tensor.dtype} has no scales beside it; "
                f"looked for {' and '.join(names)}."
            )
        found[name] = BlockMatrix(scheme, tensor, scale)
        _check(found[name])
    return found


def _check(matrix: BlockMatrix) -> None:
    (rows, columns), scale = matrix.shape, matrix.scale
    wanted = (-(-rows // SQUARE), -(-columns // SQUARE))
    if matrix.scheme == MXFP4:
        wanted = (rows, columns // MX_GROUP)
        if columns % MX_GROUP:
            raise CheckpointError(
                f"{matrix.where} has {columns} columns; {MXFP4} has multiples of {MX_GROUP}."
            )
    types = _SCALES[matrix.scheme]
    if scale.shape != wanted or scale.dtype not in types:
        raise CheckpointError(
            f"{scale.file}: tensor {scale.name!r} has shape {scale.shape} and type {scale.dtype}; "
            f"{matrix.scheme} of shape {matrix.shape} asks for {wanted} and {' or '.join(types)}."
        )


def _rows_of(tensor: StoredTensor, start: int, stop: int) -> StoredTensor:
    rows, columns = tensor.shape
    row_bytes = tensor.nbytes // rows if rows else 0
    return replace(
        tensor,
        shape=(stop - start, columns),
        offset=tensor.offset + start * row_bytes,
        nbytes=(stop - start) * row_bytes,
    )


def _numbers(scales: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> F32:
    """e8m0 bytes as numbers; 255 is NaN."""
    values = np.exp2(scales.astype(np.float32) - MX_BIAS)
    return np.where(scales == 255, np.float32(np.nan), values).astype(np.float32)
