"""A matrix of small whole numbers with a scale and a zero per row and group of columns: what GPTQ,
AWQ and compressed-tensors store, each packed in its own way."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .quantised_rows import F32, GROUP, QuantisedRows

U8 = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class GroupedMatrix:
    """value = scale * (q - zero). Rows are outputs, columns are inputs."""

    bits: int  # 4 or 8
    q: U8  # (rows, columns), 0 .. 2**bits - 1
    zero: NDArray[np.int16]  # (rows, groups)
    scale: F32  # (rows, groups)
    group: NDArray[np.int64]  # (columns,): the group that each belongs to

    def values(self, start: int, stop: int) -> F32:
        """Rows start..stop as the format defines them; a fresh array."""
        rows = slice(start, stop)
        out = self.q[rows].astype(np.float32)
        out -= self.zero[rows].astype(np.float32)[:, self.group]
        out *= self.scale[rows][:, self.group]
        return out

    def quantised_rows(self) -> QuantisedRows:
        """The same numbers with a scale per 32 columns, which are put in the order of their groups
        when they are not in it. Raises ValueError when 32 of them cross groups."""
        q, group, order = self.q, self.group, None
        if (np.diff(group) < 0).any():
            order = np.argsort(group, kind="stable").astype(np.int64)
            q, group = q[:, order], group[order]
        first = group[::GROUP]
        if (group != np.repeat(first, GROUP)[: len(group)]).any():
            raise ValueError(f"has groups of columns that are no multiple of {GROUP}")
        # Eight bits are signed in the kernels' form, four bits are not.
        middle = 1 << (self.bits - 1)
        zero = self.zero if self.bits == 4 else self.zero - np.int16(middle)
        minimum = None
        if (self.zero != middle).any():
            minimum = (self.scale * zero)[:, first]
        return QuantisedRows(
            self.bits,
            _in_groups(q if self.bits == 4 else (q ^ np.uint8(middle)).view(np.int8)),
            self.scale[:, first],
            minimum,
            q.shape[1],
            order,
        )


def _in_groups(q: NDArray[np.generic]) -> NDArray[np.generic]:
    missing = -q.shape[1] % GROUP
    whole = np.pad(q, ((0, 0), (0, missing))) if missing else np.ascontiguousarray(q)
    return whole.reshape(len(q), -1, GROUP)
