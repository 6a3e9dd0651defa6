"""How rows of images enter a step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class ImageRows:
    """Rows of images in a step: `rows` (n, hidden) replace the embeddings of the step's tokens
    `where` (n,) int64."""

    where: Tensor
    rows: Tensor

    def placed(self, embeddings: Tensor) -> Tensor:
        """(T, hidden), a copy."""
        return embeddings.index_copy(0, self.where, self.rows)
