"""Around every request: its id, the key, a count, and no exception without an answer."""

from __future__ import annotations

import hmac
import logging
import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import Match, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..common.messages import ErrorBody
from .errors import ApiError, error_response
from .service import Service

log = logging.getLogger("sixfold.server")

OPEN_PATHS = frozenset({"/", "/health", "/ready"})
"""Reachable without a key: the bare page and the probes, which tell nothing about the model."""

_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Around:
    """Pure ASGI, so that streams and disconnects pass through untouched."""

    def __init__(self, app: ASGIApp, service: Service, router: Router) -> None:
        self._app = app
        self._service = service
        self._router = router
        self._keys = [key.encode() for key in service.options.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
                self._service.metrics.http.labels(self._path(scope), status).inc()
            await send(message)

        try:
            if self._refused(scope["path"], headers):
                await error_response(_unauthorized())(scope, receive, send_with_id)
            else:
                await self._app(scope, receive, send_with_id)
        except Exception as error:
            if status:
                log.exception("request %s failed after its answer began", request_id)
                raise
            await error_response(error)(scope, receive, send_with_id)

    def _refused(self, path: str, headers: Headers) -> bool:
        if not self._keys or path in OPEN_PATHS:
            return False
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip().encode("latin-1")  # the bytes as they were sent
        # Every key is compared, in constant time, so that timing tells nothing.
        matches = [hmac.compare_digest(given, known) for known in self._keys]
        return scheme.lower() != "bearer" or not any(matches)

    def _path(self, scope: Scope) -> str:
        """The route's own spelling, so that a scan cannot create endless label values."""
        for route in self._router.routes:
            if route.matches(scope)[0] is not Match.NONE:
                return str(getattr(route, "path", "other"))
        return "other"


def _unauthorized() -> ApiError:
    body = ErrorBody(
        "A valid API key is needed: send Authorization: Bearer <key>.",
        "authentication_error",
        None,
        "invalid_api_key",
        401,
    )
    return ApiError(body, {"WWW-Authenticate": "Bearer"})
