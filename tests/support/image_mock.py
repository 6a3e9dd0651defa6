"""The mock executor with eyes: image rows and rotary positions change every token that follows.

What its first layer sees of a placeholder is a hash of the pixels behind it, and positions enter as
their three axes say. It keeps rows as a device would, and faults on an image that it was not given.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from typing import Any

import numpy as np
from support.engine_traffic import Arrival
from support.mock_executor import MockExecutor, MockFault
from support.mock_model import U64, embed

from sixfold.common.images.patches import Patches, tokens_of
from sixfold.common.images.positions import rotary_positions
from sixfold.common.messages import Image
from sixfold.common.sampling import SamplingParams
from sixfold.platforms.interface import ExecutorInfo, ImageInput
from sixfold.platforms.interface_step import StepBatch, StepImage

PAD = 31
"""The placeholder; no request may sample it."""
MERGE = 2
VALUES = 3
TAKES = ImageInput(PAD, MERGE, VALUES)


def with_images(info: ExecutorInfo) -> ExecutorInfo:
    return replace(info, images=TAKES)


def pixels(
    seed: int, down: int = 4, across: int = 4, frames: int = 1, values: int = VALUES
) -> Patches:
    rows = np.random.default_rng(seed).standard_normal((frames * down * across, values))
    return Patches(rows.astype(np.float32), (frames, down, across))


@dataclass(frozen=True)
class Seen:
    """A prompt made of token ids and images."""

    prompt: list[int]
    images: tuple[Image, ...]

    @classmethod
    def of(cls, *pieces: list[int] | Patches) -> Seen:
        prompt: list[int] = []
        images = []
        for piece in pieces:
            if isinstance(piece, Patches):
                values = piece.values.tobytes()
                images.append(Image(len(prompt), piece.grid, values, piece.digest))
                prompt += [PAD] * tokens_of(piece.grid, MERGE)
            else:
                prompt += piece
        return cls(prompt, tuple(images))

    def arrival(self, at: int, params: SamplingParams, **more: Any) -> Arrival:
        bans = {**params.logit_bias, PAD: -100.0}
        params = SamplingParams(**{**_fields(params), "logit_bias": bans})
        see = partial(_see, len(self.prompt), self.images)
        return Arrival(at, self.prompt, params, images=self.images, see=see, **more)


def _fields(params: SamplingParams) -> dict[str, Any]:
    return {name: getattr(params, name) for name in params.__struct_fields__}


def _see(length: int, images: tuple[Image, ...], tokens: list[int]) -> Any:
    """The oracle: no steps, no cache, no keys."""
    spans = [(image.start, image.grid) for image in images]
    places, shift = rotary_positions(length, spans, MERGE)
    behind = np.arange(length, len(tokens)) + shift
    places = np.concatenate([places, np.tile(behind, (3, 1))], axis=1)
    ids = np.array(tokens, U64)
    for image in images:
        values = np.frombuffer(image.patches, np.float32).reshape(-1, VALUES)
        marks = _marks(values)
        ids[image.start : image.start + len(marks)] = marks
    return embed(ids, _folded(places))


def _folded(rotary: Any) -> Any:
    """One number of three positions; equal ones are themselves."""
    time, height, width = rotary.astype(np.int64)
    return (time + 1009 * (height - time) + 1000003 * (width - time)).astype(U64)


def _marks(values: Any) -> Any:
    """A hash of the pixels of each row."""
    rows = values.reshape(-1, MERGE * MERGE * VALUES)
    digests = (blake2b(row.tobytes(), digest_size=8).digest() for row in rows)
    return np.array([int.from_bytes(digest, "little") | 1 << 63 for digest in digests], U64)


class ImageMock(MockExecutor):
    """`made` counts how often the rows of each image were computed, `most` the most kept."""

    def __init__(self, info: ExecutorInfo, lazy: bool = True) -> None:
        super().__init__(info, lazy)
        self.made: Counter[int] = Counter()
        self.kept: dict[int, Any] = {}
        self.most = 0
        self._known: dict[int, bytes] = {}

    def _embed(self, b: StepBatch, tokens: list[Any], news: list[Any]) -> list[Any]:
        flat = np.concatenate(tokens)
        ids = flat.astype(U64)
        covered = np.zeros(len(ids), bool)
        for image in b.images:
            where = slice(image.token, image.token + image.count)
            if covered[where].any() or not image.count:
                raise MockFault("two images claim one token")
            covered[where] = True
            ids[where] = self._rows(image)[image.first : image.first + image.count]
        if (covered != (flat == PAD)).any():
            raise MockFault("a placeholder has no image, or an image no placeholder")
        for key in b.images_done:
            if self.kept.pop(key, None) is None:
                raise MockFault(f"image {key} is not kept")
        plain = np.tile(np.concatenate(news), (3, 1))
        places = _folded(plain if b.rotary is None else b.rotary)
        values = embed(ids, places)
        return np.split(values, b.query_start[1:-1])

    def _rows(self, image: StepImage) -> Any:
        if self._known.setdefault(image.key, image.patches.tobytes()) != image.patches.tobytes():
            raise MockFault("two images have one key")
        if image.key not in self.kept:
            self.kept[image.key] = _marks(image.patches)
            self.made[image.key] += 1
            self.most = max(self.most, len(self.kept))
        return self.kept[image.key]
