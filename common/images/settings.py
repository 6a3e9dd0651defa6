"""How a checkpoint wants its images: preprocessor_config.json."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..checkpoint.fields import Fields
from ..checkpoint.hf_directory import read_object
from ..errors import CheckpointError

BICUBIC = 3
PROCESSORS = ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2VLImageProcessorPil")


class Pixels(Protocol):
    """What cutting needs to know. Sizes in pixels: a picture becomes patches of `frames` equal
    frames of `patch` x `patch` pixels, in blocks of `merge` x `merge` patches, of which each is one
    token of the prompt."""

    @property
    def patch(self) -> int: ...
    @property
    def frames(self) -> int: ...
    @property
    def merge(self) -> int: ...
    @property
    def scale(self) -> float:
        """Of a byte, before mean and std."""
        ...

    @property
    def mean(self) -> tuple[float, ...]:
        """Per channel: red, green, blue; so is `std`."""
        ...

    @property
    def std(self) -> tuple[float, ...]: ...


@dataclass(frozen=True, slots=True)
class ImageSettings:
    """Of a picture that is resized as a whole. Fields as in `Pixels`."""

    patch: int
    frames: int
    merge: int
    least_pixels: int
    most_pixels: int
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def unit(self) -> int:
        """Both sides of a resized image are multiples of it."""
        return self.patch * self.merge


def read_image_settings(directory: Path) -> ImageSettings:
    """From preprocessor_config.json, or processor_config.json's image_processor. Raises
    CheckpointError naming the file and the field."""
    fields = processor_fields(directory)
    kind = fields.text("image_processor_type", PROCESSORS[0])
    if kind not in PROCESSORS:
        raise fields.unsupported("image_processor_type", ", ".join(PROCESSORS))
    check_steps(fields, BICUBIC, "bicubic")
    size = Fields(fields.optional("size") or {}, fields.source)
    least = fields.positive("min_pixels", size.positive("shortest_edge", 56 * 56))
    most = fields.positive("max_pixels", size.positive("longest_edge", 28 * 28 * 1280))
    if least > most:
        raise fields.unsupported("size", "a shortest_edge below the longest_edge")
    return ImageSettings(
        patch=fields.positive("patch_size", 14),
        frames=fields.positive("temporal_patch_size", 2),
        merge=fields.positive("merge_size", 2),
        least_pixels=least,
        most_pixels=most,
        **normalisation(fields),
    )


def check_steps(fields: Fields, resample: int, called: str) -> None:
    """Raises CheckpointError for a preparation that leaves out a step, or resizes otherwise."""
    for name in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        if not fields.flag(name, True):
            raise fields.unsupported(name, "true")
    if fields.integer("resample", resample) != resample:
        raise fields.unsupported("resample", f"{resample} ({called})")


def normalisation(fields: Fields) -> dict[str, Any]:
    """scale, mean and std. Raises CheckpointError."""
    return {
        "scale": fields.number("rescale_factor", 1 / 255),
        "mean": _channels(fields, "image_mean", (0.48145466, 0.4578275, 0.40821073)),
        "std": _channels(fields, "image_std", (0.26862954, 0.26130258, 0.27577711)),
    }


def processor_fields(directory: Path) -> Fields:
    """How the checkpoint says that images are prepared. Raises CheckpointError where it says
    nothing."""
    path = directory / "preprocessor_config.json"
    values = read_object(path)
    if values is None:
        path = directory / "processor_config.json"
        values = (read_object(path) or {}).get("image_processor")
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{directory}: the model takes images, and neither preprocessor_config.json nor "
            "processor_config.json says how they are prepared; download one of them."
        )
    return Fields(values, path)


def _channels(fields: Fields, name: str, default: tuple[float, ...]) -> tuple[float, ...]:
    values = fields.optional(name)
    values = default if values is None else values
    numbers = isinstance(values, list | tuple) and all(isinstance(v, int | float) for v in values)
    if not numbers or len(values) != 3 or (name == "image_std" and 0 in values):
        raise fields.unsupported(name, "three numbers, one per channel (none 0 in image_std)")
    return tuple(float(value) for value in values)
