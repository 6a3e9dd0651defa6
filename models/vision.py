"""What a model that takes images gives the runtime, and how rows of images enter a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..common.images.patches import Grid


class VisionTower(Protocol):
    """A torch module; its parameters are under `vision.` of the model."""

    merge: int  # merge x merge patches become one row
    patch_values: int  # numbers in a patch

    def __call__(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """patches (N, patch_values) of all images, one after the other, each in blocks of merge x
        merge neighbours -> (N / merge^2, hidden), in the model's dtype."""
        ...


@dataclass(frozen=True, slots=True)
class ImageRows:
    """Rows of images in a step: `rows` (n, hidden) replace the embeddings of the step's tokens
    `where` (n,) int64."""

    where: Tensor
    rows: Tensor

    def placed(self, embeddings: Tensor) -> Tensor:
        """(T, hidden), a copy."""
        return embeddings.index_copy(0, self.where, self.rows)
