"""Contract guarded: server/images.py: where an image's bytes may come from, that a checkpoint
prepares images as its model reads them, and that placeholders and images are matched or refused."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from seeing_checkpoint import IMAGES, data_url, file_of, picture

from sixfold.common.errors import RequestError
from sixfold.common.images.patches import cut
from sixfold.common.images.preparation import AsOne, read_preparation
from sixfold.common.images.settings import read_image_settings
from sixfold.platforms.interface import ImageInput
from sixfold.server.errors import ApiError
from sixfold.server.images import ImageReader, NoImages, Pieces, open_reader, place

TAKEN = ImageInput(token_id=9, merge=2, patch_values=3 * 2 * 16 * 16)
FILE = file_of(picture(0, 64, 64))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(IMAGES))
    return tmp_path


@pytest.fixture
def reader(folder: Path) -> ImageReader:
    return ImageReader(read_preparation(folder), {}, TAKEN, 512, len(FILE) + 10)


class Files(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        answers = {"/ok": (200, FILE), "/big": (200, FILE + b"x" * 99), "/moved": (302, b"")}
        status, body = answers.get(self.path, (404, b""))
        self.send_response(status)
        self.send_header("Location", "/ok")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture(scope="module")
def files() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Files)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def read(reader: ImageReader, url: str) -> Any:
    return asyncio.run(reader.read(url, "where", 100))


def patches_in(pieces: Any) -> Any:
    (only,) = pieces.each
    return only


def refused(reader: ImageReader, url: str) -> tuple[str | None, str]:
    with pytest.raises((ApiError, RequestError)) as caught:
        read(reader, url)
    error = caught.value.body if isinstance(caught.value, ApiError) else caught.value
    assert error.param == "where"
    return error.code, error.message


def test_a_data_url_is_read_whatever_its_media_type(reader: ImageReader) -> None:
    for kind in ("image/png", "image/jpeg;charset=x", ""):
        assert patches_in(read(reader, data_url(FILE, kind))).grid == (1, 4, 4)


def test_a_fetched_file_is_the_same_image(reader: ImageReader, files: str) -> None:
    fetching = replace(reader, fetch=True)
    fetched, sent = (read(fetching, f"{files}/ok"), read(reader, data_url(FILE)))
    assert patches_in(fetched).digest == patches_in(sent).digest


@pytest.mark.parametrize(
    ("path", "word"), [("/gone", "404"), ("/moved", "302"), ("/big", "larger than")]
)
def test_what_cannot_be_fetched_says_why(
    reader: ImageReader, files: str, path: str, word: str
) -> None:
    code, message = refused(replace(reader, fetch=True), files + path)
    assert code == "invalid_image"
    assert word in message


def test_a_host_that_is_not_there_is_no_server_error(reader: ImageReader) -> None:
    assert refused(replace(reader, fetch=True), "http://127.0.0.1:1/x")[0] == "invalid_image"


def test_nothing_is_fetched_unless_allowed(reader: ImageReader, files: str) -> None:
    assert refused(reader, f"{files}/ok")[0] == "image_url_not_allowed"


def test_an_image_of_too_many_tokens_is_refused_before_it_is_cut(
    reader: ImageReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AsOne, "pieces", lambda *a: pytest.fail("was cut"))
    code, message = refused(replace(reader, max_context=104), data_url(FILE))
    assert code == "context_length_exceeded"
    assert "4 tokens, those before it 100" in message


# ---- start


class Words:
    """A vocabulary in which all words but one are a token."""

    def __init__(self, split: str = "") -> None:
        self.split = split

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [1, 2] if text == self.split else [100 + len(text)]


def opened(
    folder: Path, taken: ImageInput | None, split: str = "", **features: list[str]
) -> ImageReader | NoImages:
    checkpoint: Any = SimpleNamespace(path=folder)
    tokenizer: Any = Words(split)
    ready: Any = SimpleNamespace(images=taken, max_context=512, features=features)
    return open_reader(checkpoint, tokenizer, ready, 1000, False)


def reason(found: ImageReader | NoImages) -> str:
    assert isinstance(found, NoImages)
    return found.reason


def test_a_text_model_gives_the_platforms_reason(folder: Path) -> None:
    said = ["unsupported", "It reads text."]
    assert reason(opened(folder, None, images=said)) == "It reads text."
    assert "platform" in reason(opened(folder, None))


def test_a_model_that_sees_without_settings_refuses_images_and_says_why(folder: Path) -> None:
    assert isinstance(opened(folder, TAKEN), ImageReader)
    (folder / "preprocessor_config.json").unlink()
    assert "preprocessor_config.json" in reason(opened(folder, TAKEN))


@pytest.mark.parametrize("wrong", [{"merge": 4}, {"patch_values": 3 * 14 * 14}], ids=str)
def test_patches_of_another_size_are_refused(folder: Path, wrong: dict[str, int]) -> None:
    assert "patches of 1536" in reason(opened(folder, replace(TAKEN, **wrong)))


def test_words_that_are_no_tokens_refuse_images(folder: Path) -> None:
    views = {"image_processor_type": "Step3p7ImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(views))
    taken = ImageInput(token_id=9, merge=4, patch_values=3 * 14 * 14)
    found = opened(folder, taken)
    assert isinstance(found, ImageReader)
    assert found.words["<patch_newline>"] == 100 + len("<patch_newline>")
    assert "need <patch_end> between" in reason(opened(folder, taken, "<patch_end>"))


# ---- placeholders


def test_each_placeholder_becomes_its_images_tokens(folder: Path) -> None:
    settings = read_image_settings(folder)
    one, other = cut(picture(0, 64, 64), settings), cut(picture(1, 96, 64), settings)
    ids, images = place([1, 9, 2, 9], [Pieces((one,), 2), Pieces((other,), 2)], TAKEN)
    assert ids == [1, *[9] * 4, 2, *[9] * 6]
    assert [image.start for image in images] == [1, 6]
    assert [image.digest for image in images] == [one.digest, other.digest]
    assert images[1].patches == other.values.tobytes()


def test_an_image_of_several_pieces_keeps_their_order(folder: Path) -> None:
    settings = read_image_settings(folder)
    one, other = cut(picture(0, 64, 64), settings), cut(picture(1, 96, 64), settings)
    pieces = Pieces((7, one, 8, other, 6), 2)
    ids, images = place([1, 9, 2], [pieces], TAKEN)
    assert ids == [1, 7, *[9] * 4, 8, *[9] * 6, 6, 2]
    assert [image.start for image in images] == [2, 7]
    assert pieces.tokens == len(ids) - 2


@pytest.mark.parametrize("ids", [[1], [9, 9]])
def test_placeholders_and_images_must_be_as_many(folder: Path, ids: list[int]) -> None:
    image = cut(picture(0, 64, 64), read_image_settings(folder))
    with pytest.raises(RequestError, match="placeholder"):
        place(ids, [Pieces((image,), 2)], TAKEN)
