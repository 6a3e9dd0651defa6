"""From the bytes of a picture file to the rows that a vision tower reads."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import RequestError
from .settings import ImageSettings, Pixels

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
MOST_PIXELS = 64 * 2**20
"""Of a file before it is resized; a small file can claim any size."""
LONGEST_RATIO = 200
"""Of the longer side to the shorter."""

Grid = tuple[int, int, int]
"""Patches of an image: frames, down, across."""


@dataclass(frozen=True, slots=True)
class Patches:
    """`values` (frames * down * across, 3 * frames per patch * patch * patch) float32: each row is
    one patch (channel, frame, y, x); rows go block by block of merge x merge patches, so that
    those of one token are neighbours."""

    values: NDArray[np.float32]
    grid: Grid

    @property
    def digest(self) -> bytes:
        """Equal for equal pixels in the same grid and, for all that is known, for nothing else."""
        content = blake2b(repr(self.grid).encode(), digest_size=32)
        content.update(np.ascontiguousarray(self.values).data)
        return content.digest()


def open_picture(data: bytes) -> Image:
    """An RGB image, upright. Raises RequestError, without a parameter's name."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not data:
        raise _refusal("is empty")
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = picture.size
        if width * height > MOST_PIXELS:
            raise _refusal(f"has {width} x {height} pixels; at most {MOST_PIXELS} are read")
        if getattr(picture, "n_frames", 1) > 1:
            raise _refusal("is animated; send one frame")
        if picture.mode[:1] in ("I", "F"):  # Pillow would cut them off at 255
            raise _refusal("has more than 8 bits of grey; send 8 bits per channel")
        return ImageOps.exif_transpose(picture).convert("RGB")
    except RequestError:
        raise
    except UnidentifiedImageError:
        raise _refusal(f"is none of the formats that are read: {', '.join(FORMATS)}") from None
    except Exception as error:  # a broken file makes decoders raise anything
        raise _refusal(f"cannot be decoded ({str(error) or type(error).__name__})") from None


def fit(height: int, width: int, settings: ImageSettings) -> tuple[int, int]:
    """The size to which an image is resized: multiples of the unit, near its own proportions, with
    the pixels' number within bounds. Raises RequestError for a strip."""
    refuse_strip(height, width)
    unit = settings.unit
    down, across = (round(side / unit) * unit for side in (height, width))
    if down * across > settings.most_pixels:
        shrink = math.sqrt(height * width / settings.most_pixels)
        down, across = (
            max(unit, math.floor(side / shrink / unit) * unit) for side in (height, width)
        )
    elif down * across < settings.least_pixels:
        grow = math.sqrt(settings.least_pixels / (height * width))
        down, across = (math.ceil(side * grow / unit) * unit for side in (height, width))
    return down, across


def refuse_strip(height: int, width: int) -> None:
    """Raises RequestError."""
    if max(height, width) > LONGEST_RATIO * min(height, width):
        raise _refusal(
            f"has {width} x {height} pixels; one side may be at most {LONGEST_RATIO} times the "
            "other"
        )


def grid_of(picture: Image, settings: ImageSettings) -> Grid:
    """Known before the work of `cut`. Raises RequestError for a strip."""
    down, across = fit(picture.height, picture.width, settings)
    return 1, down // settings.patch, across // settings.patch


def tokens_of(grid: Grid, merge: int) -> int:
    """Tokens that an image takes in a prompt."""
    frames, down, across = grid
    return frames * (down // merge) * (across // merge)


def cut(picture: Image, settings: ImageSettings) -> Patches:
    """Resize (bicubic) and cut. Raises RequestError for a strip."""
    from PIL.Image import Resampling

    _, down, across = grid_of(picture, settings)
    size = across * settings.patch, down * settings.patch
    return patches_of(picture.resize(size, Resampling.BICUBIC), settings)


def patches_of(picture: Image, settings: Pixels) -> Patches:
    """Scale, normalise, and cut into patches; an image is a film of equal frames. The picture's
    sides must be multiples of patch * merge."""
    patch, merge = settings.patch, settings.merge
    down, across = picture.height // patch, picture.width // patch
    mean, std = (np.array(values, np.float32) for values in (settings.mean, settings.std))
    bright = np.asarray(picture, np.float32) * np.float32(settings.scale)
    pixels: NDArray[np.float32] = (bright - mean) / std
    blocks = pixels.reshape(down // merge, merge, patch, across // merge, merge, patch, 3)
    blocks = blocks.transpose(0, 3, 1, 4, 6, 2, 5)  # block down, across, patch in it, channel, y, x
    film = np.broadcast_to(
        blocks[:, :, :, :, :, None], (*blocks.shape[:5], settings.frames, patch, patch)
    )
    return Patches(film.reshape(down * across, -1), (1, down, across))


def _refusal(what: str) -> RequestError:
    return RequestError(f"The image {what}.", None, "invalid_image")
