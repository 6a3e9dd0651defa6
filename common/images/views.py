"""Pictures as several square views: parts of it in order, then the whole (Step-3.7-Flash).

A large or long picture is resized so that squares of one size tile it; each of them, and the whole
picture, is resized to a fixed square of its own. Words around the views tell the model where it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..checkpoint.fields import Fields
from .patches import Patches, patches_of, refuse_strip
from .settings import check_steps, normalisation

if TYPE_CHECKING:
    from PIL.Image import Image

BILINEAR = 2
PROCESSORS = ("Step3p7ImageProcessor",)

WHOLE = ("<im_start>", "<im_end>")
PART = ("<patch_start>", "<patch_end>")
NEXT_ROW = "<patch_newline>"
WORDS = (*WHOLE, *PART, NEXT_ROW)

_THIN = 32  # pixels: thinner than that and long, a picture is put into a square
_LONG = 4.0  # of the longer side to the shorter
_WIDE = 1.5  # from here on a small picture has parts too
_MOST_LEFT_OUT = 0.2  # of a square: what is beyond becomes a further one


@dataclass(frozen=True, slots=True)
class ViewSettings:
    """Sizes in pixels; other fields as in `Pixels`."""

    whole: int  # to a side of the view of all
    part: int  # and of a part
    longest: int  # of a picture that is not made smaller first
    patch: int
    merge: int
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    frames: int = 1


@dataclass(frozen=True, slots=True)
class Layout:
    """`size` (width, height) of the picture before the whole view, `tiled` (width, height) before
    it is cut into `across` x `down` squares of `square` pixels; none where `square` is 0."""

    size: tuple[int, int]
    tiled: tuple[int, int]
    square: int
    across: int
    down: int
    padded: bool  # to a square, black to the right or below

    @property
    def parts(self) -> int:
        return self.across * self.down


def read_view_settings(fields: Fields) -> ViewSettings:
    """Raises CheckpointError naming the file and the field."""
    check_steps(fields, BILINEAR, "bilinear")
    size = Fields(fields.optional("size") or {}, fields.source)
    whole = size.positive("height", 728)
    if size.positive("width", whole) != whole:
        raise fields.unsupported("size", "a square")
    settings = ViewSettings(
        whole=whole,
        part=fields.positive("patch_size", 504),
        longest=fields.positive("max_image_size", 3024),
        patch=fields.positive("vision_patch_size", 14),
        merge=fields.positive("downsampler_stride", 4),
        **normalisation(fields),
    )
    unit = settings.patch * settings.merge
    for name, side in (("size", settings.whole), ("patch_size", settings.part)):
        if side % unit:
            raise fields.unsupported(name, f"a multiple of {unit}")
    return settings


def layout(width: int, height: int, settings: ViewSettings) -> Layout:
    """How a picture is divided. Raises RequestError for a strip."""
    refuse_strip(height, width)
    padded = min(width, height) < _THIN and max(width, height) > _LONG * min(width, height)
    if padded:
        width = height = max(width, height)
    if max(width, height) > settings.longest:
        shrink = settings.longest / max(width, height)
        width, height = int(width * shrink), int(height * shrink)
    square = _square(width, height, settings)
    if not square:
        return Layout((width, height), (width, height), 0, 0, 0, padded)
    tiled = _tiled(width, square), _tiled(height, square)
    across, down = (max(1, side // square) for side in tiled)
    return Layout((width, height), tiled, square, across, down, padded)


def _square(width: int, height: int, settings: ViewSettings) -> int:
    short, long = sorted((width, height))
    if long <= settings.whole:
        return short if long / short > _WIDE else 0
    return min(short, settings.part) if long / short > _LONG else settings.part


def _tiled(side: int, square: int) -> int:
    """The multiple of `square` to which a side is resized; a shorter side stays."""
    if side < square:
        return side
    further = side % square > _MOST_LEFT_OUT * square
    return square * (side // square + further)


def view_tokens(picture: Image, settings: ViewSettings) -> int:
    """Tokens of all views and words. Raises RequestError for a strip."""
    found = layout(picture.width, picture.height, settings)
    unit = settings.patch * settings.merge
    parts = found.parts * ((settings.part // unit) ** 2 + len(PART))
    rows = max(0, found.down - 1)
    return parts + rows + (settings.whole // unit) ** 2 + len(WHOLE)


def cut_views(picture: Image, settings: ViewSettings) -> list[Patches | str]:
    """Views and words in the order in which a prompt has them. Raises RequestError for a strip."""
    found = layout(picture.width, picture.height, settings)
    if found.padded:
        picture = _in_a_square(picture)
    pieces: list[Patches | str] = []
    for number, part in enumerate(_parts(picture, found)):
        pieces += [PART[0], patches_of(_resized(part, settings.part), settings), PART[1]]
        row, column = divmod(number, found.across)
        if column == found.across - 1 and row < found.down - 1:
            pieces.append(NEXT_ROW)
    whole = _resized(_to(picture, found.size), settings.whole)
    return [*pieces, WHOLE[0], patches_of(whole, settings), WHOLE[1]]


def _parts(picture: Image, found: Layout) -> Iterator[Image]:
    """Row by row."""
    if not found.square:
        return
    tiled, side = _to(picture, found.tiled), found.square
    for top in range(0, found.tiled[1], side):
        for left in range(0, found.tiled[0], side):
            right, bottom = min(left + side, tiled.width), min(top + side, tiled.height)
            yield tiled.crop((left, top, right, bottom))


def _to(picture: Image, size: tuple[int, int]) -> Image:
    from PIL.Image import Resampling

    return picture.resize(size, Resampling.BILINEAR)


def _resized(picture: Image, side: int) -> Image:
    return _to(picture, (side, side))


def _in_a_square(picture: Image) -> Image:
    from PIL import Image as Pillow

    side = max(picture.size)
    square = Pillow.new("RGB", (side, side))
    square.paste(picture)
    return square
