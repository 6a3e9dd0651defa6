"""How a checkpoint's pictures become pieces of a prompt, by its kind of image processor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from . import settings, views
from .patches import Patches, cut, grid_of, tokens_of
from .settings import ImageSettings, Pixels, processor_fields, read_image_settings

if TYPE_CHECKING:
    from PIL.Image import Image

Piece = Patches | str
"""Of an image in a prompt: patches, which are a run of placeholder tokens, or a word, which is one
token of the vocabulary."""


class Preparation(Protocol):
    @property
    def pixels(self) -> Pixels: ...

    @property
    def words(self) -> Sequence[str]:
        """All that can be among the pieces."""
        ...

    def tokens(self, picture: Image) -> int:
        """Known before the work of `pieces`. Raises RequestError for a picture that is refused."""
        ...

    def pieces(self, picture: Image) -> list[Piece]:
        """In the order of the prompt. Raises RequestError as `tokens` does."""
        ...


@dataclass(frozen=True, slots=True)
class AsOne:
    """The whole picture, near its own size."""

    pixels: ImageSettings
    words: tuple[str, ...] = ()

    def tokens(self, picture: Image) -> int:
        return tokens_of(grid_of(picture, self.pixels), self.pixels.merge)

    def pieces(self, picture: Image) -> list[Piece]:
        return [cut(picture, self.pixels)]


@dataclass(frozen=True, slots=True)
class InViews:
    """Squares of fixed sizes, with words between them."""

    pixels: views.ViewSettings
    words: tuple[str, ...] = views.WORDS

    def tokens(self, picture: Image) -> int:
        return views.view_tokens(picture, self.pixels)

    def pieces(self, picture: Image) -> list[Piece]:
        return views.cut_views(picture, self.pixels)


def read_preparation(directory: Path) -> Preparation:
    """By `image_processor_type`. Raises CheckpointError naming the file and the field."""
    fields = processor_fields(directory)
    known = (*settings.PROCESSORS, *views.PROCESSORS)
    kind = fields.text("image_processor_type", settings.PROCESSORS[0])
    if kind in views.PROCESSORS:
        return InViews(views.read_view_settings(fields))
    if kind in settings.PROCESSORS:
        return AsOne(read_image_settings(directory))
    raise fields.unsupported("image_processor_type", ", ".join(known))
