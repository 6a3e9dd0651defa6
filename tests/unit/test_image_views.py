"""Contract of common/images/views.py: pictures are divided as transformers' processor of
Step-3.7-Flash divides them, each view has its pixels, words stand where they belong, and settings
or pictures that it does not read are refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.step3p7.image_processing_step3p7 import Step3p7ImageProcessor

from sixfold.common.errors import CheckpointError, RequestError
from sixfold.common.images import views
from sixfold.common.images.patches import Patches, tokens_of
from sixfold.common.images.preparation import InViews, read_preparation
from sixfold.common.images.views import ViewSettings, cut_views, layout, view_tokens

SMALL: dict[str, Any] = {
    "image_processor_type": "Step3p7ImageProcessor",
    "size": {"height": 112, "width": 112},
    "patch_size": 56,
    "max_image_size": 300,
}
SIZES = [(112, 112), (60, 100), (200, 120), (31, 140), (10, 90), (700, 90), (50, 300), (113, 40)]


def settings(folder: Path, **changes: Any) -> ViewSettings:
    (folder / "preprocessor_config.json").write_text(json.dumps({**SMALL, **changes}))
    found = read_preparation(folder)
    assert isinstance(found, InViews)
    return found.pixels


def picture(width: int, height: int) -> Image.Image:
    """Smooth, so that ways of resizing differ little."""
    small = np.random.default_rng(width).integers(0, 256, (6, 5, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


class Oracle:
    """transformers' own division, on torch's resizing: its base class wants torchvision, which
    resizes bytes by the same function."""

    _is_extreme_aspect = staticmethod(Step3p7ImageProcessor._is_extreme_aspect)
    _plan_patches = Step3p7ImageProcessor._plan_patches
    _get_image_patches = Step3p7ImageProcessor._get_image_patches
    _preprocess = Step3p7ImageProcessor._preprocess

    def __init__(self, longest: int) -> None:
        self.max_image_size = longest

    def resize(self, image: Any, size: Any, resample: Any = None) -> Any:
        wanted = (size.height, size.width)
        return torch.nn.functional.interpolate(image, wanted, mode="bilinear", antialias=True)

    def pad(self, images: Any, pad_size: Any) -> Any:
        right, below = (pad_size.width - images[0].shape[2], pad_size.height - images[0].shape[1])
        return [torch.nn.functional.pad(images[0], (0, right, 0, below))]

    def rescale_and_normalize(
        self, image: Any, do_rescale: Any, factor: float, do_normalize: Any, mean: Any, std: Any
    ) -> Any:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
        return (image.float() * factor - mean) / std

    def __call__(self, image: Image.Image, found: ViewSettings) -> Any:
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
        return self._preprocess(
            [pixels], True, found.scale, True, found.mean, found.std, None,
            SimpleNamespace(height=found.whole), found.part, False, None,
        )  # fmt: skip


def pixels_of(patches: Patches, merge: int = 4, patch: int = 14) -> np.ndarray:
    """Back to (3, height, width)."""
    _, down, across = patches.grid
    blocks = patches.values.reshape(down // merge, across // merge, merge, merge, 3, patch, patch)
    return blocks.transpose(4, 0, 2, 5, 1, 3, 6).reshape(3, down * patch, across * patch)


@pytest.mark.parametrize("published", [False, True], ids=["small", "published"])
def test_layouts_are_those_of_transformers(published: bool, tmp_path: Path) -> None:
    found = settings(tmp_path)
    if published:
        found = ViewSettings(728, 504, 3024, 14, 4, 1 / 255, found.mean, found.std)
    oracle = Oracle(found.longest)
    rng = np.random.default_rng(0)
    top = 5 * found.longest // 4
    pairs = [*SIZES, *rng.integers(1, top, (400, 2)).tolist()]
    pairs += [(w, int(w * r) + 1) for w in (20, 40, 300) for r in (1.4, 1.6, 3.9, 4.1, 9)]
    seen = set()
    for width, height in pairs:
        if max(width, height) > 200 * min(width, height):
            continue
        ours = layout(width, height, found)
        plan = oracle._plan_patches(width, height, found.whole, found.part)
        size, tiled, square, across, down, padded = plan
        assert (ours.size, ours.padded, ours.square) == (size, padded, square)
        if square:
            assert (ours.tiled, ours.across, ours.down) == (tiled, across, down)
        seen.add((padded, square == 0, square == found.part))
    assert len(seen) >= 4


def test_views_have_the_pixels_that_transformers_gives_them(tmp_path: Path) -> None:
    """Bytes are rounded after each resizing; two ways of it may differ by two of 255 there."""
    found = settings(tmp_path)
    counts = set()
    for width, height in SIZES:
        image = picture(width, height)
        wanted = Oracle(found.longest)(image, found)
        pieces = cut_views(image, found)
        shown = [piece for piece in pieces if isinstance(piece, Patches)]
        parts = wanted["num_local_patches"][0]
        assert len(shown) == parts + 1
        expected = [*wanted.get("pixel_values_local", []), wanted["pixel_values"][0]]
        for ours, theirs in zip(shown, expected, strict=True):
            off = np.abs(pixels_of(ours) - theirs.numpy()).max()
            assert off < 2.5 * found.scale / min(found.std)
        counts.add(parts)
        words = [piece for piece in pieces if isinstance(piece, str)]
        breaks = [i for i, new in enumerate(wanted.get("patch_newline_masks", [[]])[0]) if new]
        assert [i for i, word in enumerate(_after_parts(words)) if word] == breaks
        assert words[-2:] == list(views.WHOLE)
    assert len(counts) >= 4


def _after_parts(words: list[str]) -> list[bool]:
    """Of each part, whether a new row begins behind it."""
    ends = [i for i, word in enumerate(words) if word == views.PART[1]]
    return [words[i + 1] == views.NEXT_ROW for i in ends]


def test_tokens_are_known_before_the_work(tmp_path: Path) -> None:
    found = settings(tmp_path)
    for size in SIZES:
        image = picture(*size)
        pieces = cut_views(image, found)
        made = sum(1 if isinstance(p, str) else tokens_of(p.grid, found.merge) for p in pieces)
        assert made == view_tokens(image, found)


def test_a_whole_view_is_169_tokens_and_a_part_81(tmp_path: Path) -> None:
    values = {"image_processor_type": "Step3p7ImageProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    published = read_preparation(tmp_path)
    small = picture(700, 700)
    assert published.tokens(small) == 169 + 2
    large = picture(1008, 1008)
    assert published.tokens(large) == 4 * (81 + 2) + 1 + 169 + 2


def test_a_strip_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="200 times"):
        cut_views(picture(201, 1), settings(tmp_path))


@pytest.mark.parametrize(
    "changes",
    [
        {"patch_size": 50},
        {"size": {"height": 100, "width": 100}},
        {"size": {"height": 112, "width": 56}},
        {"resample": 3},
        {"do_normalize": False},
        {"image_std": [0, 1, 1]},
        {"image_processor_type": "Step9ImageProcessor"},
    ],
    ids=str,
)
def test_settings_that_are_not_read_are_named(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=next(iter(changes))):
        settings(tmp_path, **changes)
