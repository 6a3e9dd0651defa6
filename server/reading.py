"""From the bytes of a request to a checked body; what is wrong with them is a 400 that names it."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from ..common.messages import ErrorBody
from .errors import ApiError, ClientGone, bad_request

M = TypeVar("M", bound=BaseModel)


def _too_large(limit: int) -> ApiError:
    message = f"The request body is larger than {limit} bytes. Send less or raise --max-body-bytes."
    return ApiError(
        ErrorBody(message, "invalid_request_error", None, "request_too_large", 413),
        {"Connection": "close"},
    )


def _check_headers(request: Request, limit: int) -> None:
    kind = request.headers.get("content-type", "application/json")
    name, _, rest = kind.partition(";")
    parameters = rest.replace(" ", "").lower()
    json = name.strip().lower() == "application/json" or name.strip().lower().endswith("+json")
    charset = parameters.partition("charset=")[2].strip('"')
    encoding = request.headers.get("content-encoding", "identity").lower()
    if not json or charset not in ("", "utf-8", "utf8") or encoding != "identity":
        got = f"{kind}" + (f" in {encoding}" if encoding != "identity" else "")
        message = f"Send the body as Content-Type: application/json in plain UTF-8, not {got!r}."
        raise ApiError(
            ErrorBody(message, "invalid_request_error", None, "unsupported_media_type", 415)
        )
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > limit:
        raise _too_large(limit)


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body. Raises ApiError 413 as soon as it grows beyond `limit` bytes."""
    _check_headers(request, limit)
    parts: list[bytes] = []
    size = 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise _too_large(limit)
            parts.append(part)
    except ClientDisconnect:
        raise ClientGone from None
    return b"".join(parts)


def parse_json(body: bytes) -> dict[str, Any]:
    """A JSON object in UTF-8. Raises ApiError 400."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise bad_request(
            f"The body is not valid UTF-8 (byte {error.start}).", None, "invalid_utf8"
        ) from None
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise bad_request(f"The body is not valid JSON: {error}.", None, "invalid_json") from None
    if not isinstance(value, dict):
        raise bad_request("The body must be a JSON object.", None, "invalid_json")
    return value


def checked(model: type[M], fields: dict[str, Any]) -> M:
    """Validate; the first problem becomes an ApiError 400 that names the field."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise _first_problem(error) from None


def field_path(location: tuple[int | str, ...]) -> str:
    """("messages", 0, "role") -> "messages[0].role"."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


_UNION_TAGS = ("str", "int", "bool", "float", "TextPart", "ImagePart", "StreamOptions")


def _first_problem(error: ValidationError) -> ApiError:
    """Prefer unknown and missing fields to wrong values: they explain the rest. Of the branches of
    a union the deepest location is the one that was meant."""
    problems = error.errors(include_url=False, include_context=False)
    order = {"extra_forbidden": 0, "missing": 1}
    problem = min(problems, key=lambda p: (order.get(p["type"], 2), -len(p["loc"])))
    location = tuple(
        part
        for part in problem["loc"]
        if isinstance(part, int) or not (part in _UNION_TAGS or part.startswith("list["))
    )
    path = field_path(location)
    if problem["type"] == "extra_forbidden":
        return bad_request(f"Unknown parameter: {path}.", path, "unknown_parameter")
    if problem["type"] == "missing":
        return bad_request(f"Missing required parameter: {path}.", path, "missing_parameter")
    message = problem["msg"].removeprefix("Value error, ")
    got = problem.get("input")
    shown = "" if isinstance(got, dict | list) else f", got {_short(got)}"
    same = [p["msg"] for p in problems if _base(p["loc"]) == _base(problem["loc"])]
    if len(same) > 1:
        message = " or ".join(dict.fromkeys(same))
    return bad_request(f"{path}: {message}{shown}.", path, "invalid_value")


def _base(location: tuple[int | str, ...]) -> int | str | None:
    return location[0] if location else None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
