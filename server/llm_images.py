"""Images in conversations of the offline `LLM`: files, bytes, or data: URLs as over HTTP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..common.errors import RequestError
from .images import ImageReader, NoImages, Pieces, from_data_url

IMAGE_PART: Mapping[str, str] = {"type": "image"}
"""An image as chat templates know it."""


def take_images(
    messages: Sequence[Mapping[str, Any]], reader: ImageReader | NoImages
) -> tuple[list[Mapping[str, Any]], list[Pieces]]:
    """The messages as a template takes them, and their images in order. An image is a part
    {"type": "image", "image": path or bytes}, or OpenAI's image_url with a data: URL. Raises
    RequestError."""
    images: list[Pieces] = []
    result: list[Mapping[str, Any]] = []
    tokens = 0
    for number, message in enumerate(messages):
        content = message.get("content")
        parts: list[Any] = []
        for index, part in enumerate(content if isinstance(content, list | tuple) else ()):
            if not isinstance(part, Mapping) or part.get("type") not in ("image", "image_url"):
                parts.append(part)
                continue
            param = f"messages[{number}].content[{index}]"
            if isinstance(reader, NoImages):
                raise RequestError(
                    f"{param} is an image, and none can be taken: {reader.reason}",
                    param,
                    "unsupported_value",
                )
            images.append(reader.cut(_bytes(part, param), param, tokens))
            tokens += images[-1].tokens
            parts.append(IMAGE_PART)
        result.append({**message, "content": parts} if parts else message)
    return result, images


def _bytes(part: Mapping[str, Any], param: str) -> bytes:
    if part["type"] == "image_url":
        url = part.get("image_url")
        return from_data_url(str(url.get("url") if isinstance(url, Mapping) else url), param)
    source = part.get("image")
    if isinstance(source, bytes):
        return source
    if not isinstance(source, str | Path):
        raise RequestError(
            f"{param}: image must be a path or bytes, not {type(source).__name__}.",
            param,
            "invalid_value",
        )
    try:
        return Path(source).read_bytes()
    except OSError as error:
        raise RequestError(
            f"{param}: {source} cannot be read ({error.strerror}).", param, "invalid_value"
        ) from None
