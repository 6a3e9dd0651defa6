"""How rows of images enter a step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

ROWS_AT_ONCE = 8192
"""Patches that go through an MLP together: its inner width would be most of a large image's
memory."""


@dataclass(frozen=True, slots=True)
class ImageRows:
    """Rows of images in a step: `rows` (n, hidden) replace the embeddings of the step's tokens
    `where` (n,) int64."""

    where: Tensor
    rows: Tensor

    def placed(self, embeddings: Tensor) -> Tensor:
        """(T, hidden), a copy."""
        return embeddings.index_copy(0, self.where, self.rows)


def working_bytes(patches: int, values: int, width: int, inner: int, itemsize: int) -> int:
    """What a tower has in memory at once, at most, beside its weights, for `patches` rows of
    `values` float32: those, some arrays of `width` (kernels widen a part of them to float32), and
    the inside of an MLP before and behind its activation."""
    rows = patches * (values * 4 + width * (4 * itemsize + 7 * 4))
    return rows + 2 * min(patches, ROWS_AT_ONCE) * inner * itemsize
