"""Images of requests as the scheduler sees them: spans of the prompt, keys for the prefix tree,
rotary positions, and the runs of rows that a step places."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from ...platforms.interface import ExecutorInfo, ImageInput
from ...platforms.interface_kv import I32
from ...platforms.interface_step import F32, LAST_TOKEN, StepImage
from ..errors import RequestError
from ..images.patches import tokens_of
from ..images.positions import rotary_positions
from ..messages import AddRequest, Image

if TYPE_CHECKING:
    from .batch import Part
    from .row import Row

REMEMBERED = 4096
"""Digests that have a key. An image that comes again after so many others gets a new one."""


class ImageKeys:
    """A number for each digest, never one number for two."""

    def __init__(self, remembered: int = REMEMBERED) -> None:
        self._keys: OrderedDict[bytes, int] = OrderedDict()
        self._remembered = remembered
        self._next = 0

    def of(self, digest: bytes) -> int:
        if digest not in self._keys:
            self._keys[digest] = self._next
            self._next += 1
            if len(self._keys) > self._remembered:
                self._keys.popitem(last=False)
        self._keys.move_to_end(digest)
        return self._keys[digest]


@dataclass(frozen=True, slots=True)
class Span:
    """An image at the places `start` to `end - 1` of a prompt."""

    start: int
    end: int
    key: int
    grid: tuple[int, int, int]
    patches: F32


class RowImages:
    """The images of one request, in order. Places are of the whole sequence, from 0."""

    __slots__ = ("_places", "_shift", "spans")

    def __init__(
        self, spans: Sequence[Span], length: int, merge: int, sequential: bool = False
    ) -> None:
        """`length`: tokens of the prompt. `sequential`: images' tokens count as text's do."""
        self.spans = tuple(spans)
        grids = [] if sequential else [(span.start, span.grid) for span in spans]
        self._places, self._shift = rotary_positions(length, grids, merge)

    def keys(self, prompt: I32) -> I32:
        """The prompt as the prefix tree knows it: an image's placeholders are numbers that are no
        token's, and no other image's."""
        keys = prompt.copy()
        for span in self.spans:
            keys[span.start : span.end] = LAST_TOKEN - 1 - span.key
        return keys

    def rotary(self, start: int, count: int) -> I32:
        """(3, count) from `start` on; behind the prompt all three go on together."""
        known = self._places[:, start : start + count]
        behind = np.arange(start + known.shape[1], start + count, dtype=np.int32) + self._shift
        return np.concatenate([known, np.broadcast_to(behind, (3, len(behind)))], axis=1)

    def within(self, start: int, count: int, token: int) -> Iterator[StepImage]:
        """What the places from `start` on show of the images; `token` is where the first of them
        is in the step."""
        for span in self.spans:
            first, end = max(start, span.start), min(start + count, span.end)
            if first < end:
                yield StepImage(
                    span.key,
                    span.grid,
                    span.patches,
                    first - span.start,
                    token + first - start,
                    end - first,
                )

    def ahead(self, computed: int) -> Iterator[int]:
        """Keys of the images that are not wholly among the first `computed` places."""
        return (span.key for span in self.spans if span.end > computed)


@dataclass(frozen=True, slots=True)
class SentImages:
    """The fields of StepBatch that are about images."""

    images: tuple[StepImage, ...] = ()
    done: tuple[int, ...] = ()
    rotary: I32 | None = None


NO_IMAGES = SentImages()


class ImageSender:
    """Remembers of which images the executor keeps rows."""

    def __init__(self) -> None:
        self._kept: set[int] = set()

    def send(self, parts: Sequence[Part], running: Iterable[Row]) -> SentImages:
        """`running`: all rows that may go on, `computed` counting the step that is being built."""
        if not self._kept and all(part.row.images is None for part in parts):
            return NO_IMAGES
        placed: list[StepImage] = []
        token = 0
        for part in parts:
            if part.row.images is not None:
                placed += part.row.images.within(part.start, part.count, token)
            token += part.count
        kept = self._kept | {image.key for image in placed}
        rows = ((row.images, row.computed) for row in running)
        ahead = {key for images, done in rows if images is not None for key in images.ahead(done)}
        self._kept = kept & ahead
        return SentImages(tuple(placed), tuple(sorted(kept - ahead)), _rotary(parts))


def _rotary(parts: Sequence[Part]) -> I32 | None:
    """(3, T); None when no row of the step has images."""
    if all(part.row.images is None for part in parts):
        return None
    pieces = []
    for part in parts:
        images = part.row.images
        if images is None:
            places = np.arange(part.start, part.start + part.count, dtype=np.int32)
            pieces.append(np.broadcast_to(places, (3, part.count)))
        else:
            pieces.append(images.rotary(part.start, part.count))
    return np.concatenate(pieces, axis=1)


def check_images(
    request: AddRequest, prompt: I32, info: ExecutorInfo, keys: ImageKeys
) -> RowImages | None:
    """The request's images in their places. Raises RequestError where the model takes none, or one
    does not fit its place."""
    if not request.images:
        return None
    taken = info.images
    if taken is None:
        support = info.features.get("images")
        reason = support.reason if support else "the platform has no way to take them."
        raise RequestError(
            f"This model takes no images on the platform {info.device.kind!r}: {reason} "
            "Send text alone.",
            "images",
            "unsupported_parameter",
        )
    spans: list[Span] = []
    for number, image in enumerate(request.images):
        first = spans[-1].end if spans else 0
        problem = _problem(image, prompt, first, taken)
        if problem:
            raise RequestError(f"images[{number}] {problem}.", f"images[{number}]", "invalid_value")
        end = image.start + tokens_of(image.grid, taken.merge)
        values = np.frombuffer(image.patches, np.float32).reshape(-1, taken.patch_values)
        spans.append(Span(image.start, end, keys.of(image.digest), image.grid, values))
    return RowImages(spans, len(prompt), taken.merge, taken.sequential)


def _problem(image: Image, prompt: I32, first: int, taken: ImageInput) -> str:
    """What is wrong with an image that may begin at `first`, or ""."""
    if min(image.grid) < 1 or any(side % taken.merge for side in image.grid[1:]):
        return f"has the grid {image.grid}; height and width must be multiples of {taken.merge}"
    wanted = 4 * prod(image.grid) * taken.patch_values
    if len(image.patches) != wanted:
        return f"has {len(image.patches)} bytes of patches; its grid asks for {wanted}"
    count = tokens_of(image.grid, taken.merge)
    end = image.start + count
    if image.start < first or end > len(prompt):
        return f"is at {image.start}..{end - 1}, beyond the prompt or in the image before it"
    if (prompt[image.start : end] != taken.token_id).any():
        return f"needs {count} tokens {taken.token_id} from {image.start} on"
    return ""
