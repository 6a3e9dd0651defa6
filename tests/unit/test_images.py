"""Contract of common/images: pictures become the rows and grids that transformers' processor makes,
prompts get the positions of Qwen3.5's rule, and what is no picture is refused with the reason."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sixfold.common.errors import CheckpointError, RequestError
from sixfold.common.images import patches as module
from sixfold.common.images.patches import cut, fit, grid_of, open_picture, tokens_of
from sixfold.common.images.positions import rotary_positions
from sixfold.common.images.settings import ImageSettings, read_image_settings

PUBLISHED: dict[str, Any] = {
    "size": {"shortest_edge": 65536, "longest_edge": 16777216},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "image_processor_type": "Qwen2VLImageProcessorFast",
}
SMALL = {**PUBLISHED, "size": {"shortest_edge": 32 * 32 * 4, "longest_edge": 32 * 32 * 24}}
CLIP = {k: v for k, v in SMALL.items() if k not in ("image_mean", "image_std")}
SIZES = [(64, 64), (200, 90), (31, 333), (7, 9), (400, 300), (1, 200), (48, 80), (255, 257)]


def settings(tmp_path: Path, values: dict[str, Any]) -> ImageSettings:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    return read_image_settings(tmp_path)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize("values", [SMALL, CLIP], ids=["own_mean", "default_mean"])
def test_rows_and_grids_equal_transformers(values: dict[str, Any], tmp_path: Path) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    oracle = Qwen2VLImageProcessorPil(
        **{k: v for k, v in values.items() if k != "image_processor_type"}
    )
    ours = settings(tmp_path, values)
    for width, height in SIZES:
        image = picture(width, height, seed=width)
        wanted = oracle(images=[image], return_tensors="np")
        found = cut(image, ours)
        assert list(found.grid) == wanted["image_grid_thw"][0].tolist(), (width, height)
        np.testing.assert_allclose(found.values, wanted["pixel_values"], atol=1e-5, rtol=0)
        assert found.values.dtype == np.float32


def test_sizes_equal_transformers_over_the_published_range(tmp_path: Path) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    ours = settings(tmp_path, PUBLISHED)
    rng = np.random.default_rng(3)
    for _ in range(500):
        height, width = (int(side) for side in np.exp(rng.uniform(0, 9.2, 2)))
        if max(height, width) > 200 * min(height, width):
            continue
        found = fit(height, width, ours)
        assert found == smart_resize(height, width, 32, 65536, 16777216)
        assert all(side % 32 == 0 and side > 0 for side in found)


def test_the_comparison_would_see_a_wrong_order_of_rows(tmp_path: Path) -> None:
    """Blocks of 2 x 2 patches: rows in plain raster order are other rows."""
    found = cut(picture(128, 64), settings(tmp_path, SMALL))
    down, across = found.grid[1:]
    blocks = found.values.reshape(down // 2, across // 2, 2, 2, -1)
    raster = blocks.transpose(0, 2, 1, 3, 4).reshape(found.values.shape)
    assert not np.allclose(raster, found.values)


def test_a_checkpoint_saved_by_transformers_5_is_read(tmp_path: Path) -> None:
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": SMALL}))
    assert read_image_settings(tmp_path).most_pixels == 32 * 32 * 24


def test_older_names_of_the_bounds_win(tmp_path: Path) -> None:
    found = settings(tmp_path, {**SMALL, "min_pixels": 4096, "max_pixels": 8192})
    assert (found.least_pixels, found.most_pixels) == (4096, 8192)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"image_processor_type": "SomeOther"}, "image_processor_type"),
        ({"do_normalize": False}, "do_normalize"),
        ({"resample": 2}, "resample"),
        ({"image_std": [0.5, 0.0, 0.5]}, "image_std"),
        ({"image_mean": [0.5]}, "image_mean"),
        ({"patch_size": 0}, "patch_size"),
        ({"size": {"shortest_edge": 9, "longest_edge": 8}}, "size"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_settings_that_cannot_be_honoured_are_refused(
    change: dict[str, Any], word: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=word):
        settings(tmp_path, {**SMALL, **change})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json"):
        read_image_settings(tmp_path)


# ---- reading files


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF"])
def test_formats_are_read(form: str) -> None:
    assert open_picture(encoded(picture(20, 10), form)).size == (20, 10)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_every_colour_mode_becomes_rgb(mode: str) -> None:
    form = "JPEG" if mode == "CMYK" else "PNG"
    assert open_picture(encoded(picture(5, 4).convert(mode), form)).mode == "RGB"


def test_a_photo_that_lies_on_its_side_is_turned() -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    assert open_picture(encoded(picture(20, 10), "JPEG", exif=turned)).size == (10, 20)


def _animated() -> bytes:
    return encoded(picture(9, 9), "GIF", save_all=True, append_images=[picture(9, 9, 1)])


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "is empty"),
        (b"no picture at all", "formats"),
        (encoded(picture(60, 60))[:400], "cannot be decoded"),
        (encoded(picture(8, 8), "BMP"), "formats"),
        (_animated(), "animated"),
        (encoded(Image.fromarray(np.full((4, 4), 999, np.uint16))), "8 bits"),
    ],
    ids=["empty", "text", "cut_short", "bmp", "animated", "sixteen_bits"],
)
def test_what_is_no_picture_is_refused(data: bytes, word: str) -> None:
    with pytest.raises(RequestError, match=word) as caught:
        open_picture(data)
    assert caught.value.code == "invalid_image"


def test_a_small_file_of_many_pixels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_PIXELS", 99)
    with pytest.raises(RequestError, match="10 x 10 pixels"):
        open_picture(encoded(picture(10, 10)))


def test_a_strip_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="200 times"):
        grid_of(picture(201, 1), settings(tmp_path, SMALL))


# ---- identity and positions


def test_a_digest_tells_pixels_and_grids_apart(tmp_path: Path) -> None:
    ours = settings(tmp_path, SMALL)
    one, same, other = (cut(picture(64, 96, seed), ours) for seed in (1, 1, 2))
    assert one.digest == same.digest != other.digest
    nearly = replace(one, values=one.values.copy())
    nearly.values[-1, -1] = np.nextafter(nearly.values[-1, -1], np.float32(9))
    assert nearly.digest != one.digest
    assert replace(one, grid=(1, one.grid[2], one.grid[1])).digest != one.digest


def test_positions_of_the_published_example() -> None:
    """3 text tokens, a 4 x 4 image, 3 text tokens."""
    places, shift = rotary_positions(10, [(3, (1, 4, 4))], 2)
    assert places.tolist() == [
        [0, 1, 2, 3, 3, 3, 3, 5, 6, 7],
        [0, 1, 2, 3, 3, 4, 4, 5, 6, 7],
        [0, 1, 2, 3, 4, 3, 4, 5, 6, 7],
    ]
    assert shift == -2


@pytest.mark.parametrize(
    ("before", "grids", "after"),
    [(0, [(1, 4, 6)], 0), (5, [(1, 8, 2), (1, 2, 2)], 4), (1, [(3, 4, 2)], 2), (4, [], 3)],
    ids=["only_an_image", "two_at_once", "a_film", "no_image"],
)
def test_positions_equal_transformers(
    before: int, grids: list[tuple[int, int, int]], after: int
) -> None:
    import torch
    from support.tiny_qwen3_5 import TEXT, TOKENS, VISION
    from transformers import Qwen3_5Config
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5Model

    kinds, images = [0] * before, []
    for grid in grids:
        images.append((len(kinds), grid))
        kinds += [1] * tokens_of(grid, 2) + [0]
    kinds += [0] * after
    with torch.device("meta"):
        oracle = Qwen3_5Model(Qwen3_5Config(text_config=TEXT, vision_config=VISION, **TOKENS))
    places, shift = oracle.get_rope_index(
        torch.zeros((1, len(kinds)), dtype=torch.long),
        torch.tensor([kinds]),
        torch.tensor(grids) if grids else None,
    )
    found, ours = rotary_positions(len(kinds), images, 2)
    np.testing.assert_array_equal(found, places[:, 0].numpy())
    assert ours == int(shift)
