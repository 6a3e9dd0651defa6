"""Rows of images: made by the model's vision tower once, and kept while steps ask for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from ...common.images.patches import tokens_of
from ...models.base import Model
from ...models.vision import ImageRows
from ..interface_step import StepBatch, StepImage
from .device import TorchDevice

PATCHES_AT_ONCE = 8192
"""Of several images: what the tower needs beside its weights grows with them."""


PATCHES_OF_ONE = 65_536
"""The most that published settings make of one image."""


def tower_memory(model: Model, context: int) -> int:
    """Bytes that the tower needs beside its weights, for what may come at once in `context`."""
    taken = model.images()
    if taken is None:
        return 0
    return model.image_memory(min(PATCHES_OF_ONE, context * taken.merge**2))


class ImageEncoder:
    """One per runner; a model without a tower gets steps without images."""

    def __init__(self, model: Model, device: TorchDevice) -> None:
        self._model = model
        self._device = device
        taken = model.images()
        self._merge = 1 if taken is None else taken.merge
        self._kept: dict[int, Tensor] = {}  # key -> (tokens of the image, hidden)

    def placed(self, batch: StepBatch) -> ImageRows | None:
        """What the step's images put in place of embeddings; None when it has none."""
        new = {image.key: image for image in batch.images if image.key not in self._kept}
        if new:
            self._encode(list(new.values()))
        result = self._rows(batch.images) if batch.images else None
        for key in batch.images_done:
            del self._kept[key]
        return result

    def _encode(self, images: Sequence[StepImage]) -> None:
        """Small images together, as far as they are few patches; a large one alone."""
        start = 0
        for end in range(1, len(images) + 1):
            ahead = images[start : end + 1]
            if end == len(images) or sum(len(i.patches) for i in ahead) > PATCHES_AT_ONCE:
                self._encode_together(images[start:end])
                start = end

    def _encode_together(self, images: Sequence[StepImage]) -> None:
        keys, grids, patches = zip(*((i.key, i.grid, i.patches) for i in images), strict=True)
        rows = self._model.image_rows(self._device.to_device(np.concatenate(patches)), grids)
        sizes = [tokens_of(grid, self._merge) for grid in grids]
        self._kept.update(zip(keys, rows.split(sizes), strict=True))

    def _rows(self, images: Iterable[StepImage]) -> ImageRows:
        parts = [self._kept[i.key][i.first : i.first + i.count] for i in images]
        where = np.concatenate([np.arange(i.token, i.token + i.count) for i in images])
        return ImageRows(self._device.to_device(where.astype(np.int64)), torch.cat(parts))
