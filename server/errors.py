"""Every error leaves the server as {"error": {message, type, param, code}}."""

from __future__ import annotations

import logging
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ..common.errors import EngineDied, RequestError, SixfoldError
from ..common.messages import ErrorBody

log = logging.getLogger("sixfold.server")


class ApiError(Exception):
    """An error with its HTTP status and headers; `body` is what the client sees."""

    def __init__(self, body: ErrorBody, headers: dict[str, str] | None = None) -> None:
        super().__init__(body.message)
        self.body = body
        self.headers = dict(headers or {})
        if body.retry_after is not None:
            self.headers["Retry-After"] = str(body.retry_after)


class ClientGone(Exception):
    """The client closed its connection; there is nobody to answer."""


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(ErrorBody(message, "invalid_request_error", param, code, 400))


def unavailable(message: str, code: str, retry_after: int) -> ApiError:
    return ApiError(ErrorBody(message, "service_unavailable_error", None, code, 503, retry_after))


def engine_gone() -> ApiError:
    return unavailable(
        "The engine process has ended; the server is shutting down.", "engine_dead", 5
    )


def body_of(error: Exception) -> ErrorBody:
    """Any exception as an error object. Unknown ones are logged and shown without their text."""
    if isinstance(error, ApiError):
        return error.body
    if isinstance(error, EngineDied):
        return engine_gone().body
    if isinstance(error, RequestError):
        retry_after = getattr(error, "retry_after", None)
        return ErrorBody(
            error.message, error.type, error.param, error.code, error.status, retry_after
        )
    if isinstance(error, SixfoldError):
        return ErrorBody(str(error), code="internal_error")
    log.error("unhandled error while serving a request", exc_info=error)
    return ErrorBody("Internal error; the server's log has the details.", code="internal_error")


def error_object(body: ErrorBody) -> dict[str, Any]:
    return {
        "error": {
            "message": body.message,
            "type": body.type,
            "param": body.param,
            "code": body.code,
        }
    }


def error_response(error: Exception) -> Response:
    api = error if isinstance(error, ApiError) else ApiError(body_of(error))
    return Response(
        msgspec.json.encode(error_object(api.body)),
        api.body.status,
        api.headers,
        "application/json",
    )


def not_found(path: str) -> ApiError:
    message = f"There is nothing at {path}. The API is under /v1."
    return ApiError(ErrorBody(message, "invalid_request_error", None, "not_found", 404))


def wrong_method(method: str, path: str, allow: str) -> ApiError:
    message = f"{method} is not possible on {path}; use {allow}."
    body = ErrorBody(message, "invalid_request_error", None, "method_not_allowed", 405)
    return ApiError(body, {"Allow": allow})


async def on_error(request: Request, error: Exception) -> Response:
    return error_response(error)


async def on_client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)


async def on_http_error(request: Request, error: Exception) -> Response:
    """Starlette's own 404 and 405."""
    status = getattr(error, "status_code", 500)
    path = request.url.path
    if status == 404:
        return error_response(not_found(path))
    if status == 405:
        allow = (getattr(error, "headers", None) or {}).get("Allow", "")
        allow = ", ".join(sorted(filter(None, allow.replace(" ", "").split(","))))
        return error_response(wrong_method(request.method, path, allow))
    return error_response(error)
