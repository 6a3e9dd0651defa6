"""A quantised matrix taken apart and not converted: what kernels for quantised weights read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
GROUP = 32
"""Numbers that share a scale; with twice as many scales as groups, sixteen do."""


@dataclass(frozen=True, slots=True)
class QuantisedRows:
    """Rows of a matrix in groups of 32 columns, the last one filled up with anything.

    value = scale * q - minimum, or scale * (q - 8) for four bits without minimums.
    """

    bits: int  # 4: q is 0..15; 8: q is any int8
    q: NDArray[Any]  # (rows, groups, 32) uint8 or int8
    scale: F32  # (rows, groups), or (rows, 2 * groups)
    minimum: F32 | None  # (rows, groups)
    columns: int
    order: NDArray[np.int64] | None = None
    """Place in q -> column of the matrix, where the columns of a group are not neighbours."""

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.q), self.columns
