"""JSON and event-stream responses, and noticing that the client has gone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .errors import ClientGone, body_of, error_object
from .generation import Run

log = logging.getLogger("sixfold.server")

T = TypeVar("T")
_encode = msgspec.json.Encoder().encode

DONE = b"data: [DONE]\n\n"


def json_response(content: Any, status: int = 200) -> Response:
    return Response(_encode(content), status, media_type="application/json")


def sse(content: Any) -> bytes:
    return b"data: " + _encode(content) + b"\n\n"


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, unless the client goes first: then it is cancelled and ClientGone
    raised. The request's body must have been read."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        request.app.state.service.metrics.aborted.inc()
        raise ClientGone
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


class EventStream(Response):
    """Server-sent events of one run. The run is closed when the stream ends, however it ends."""

    media_type = "text/event-stream"

    def __init__(self, run: Run, events: AsyncIterator[bytes]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._run = run
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writer = asyncio.ensure_future(self._write(send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait((writer, gone), return_when=asyncio.FIRST_COMPLETED)
            if writer.done():
                writer.result()
            else:
                scope["app"].state.service.metrics.aborted.inc()
        finally:
            self._run.close()
            for task in (writer, gone):
                task.cancel()
            await asyncio.gather(writer, gone, return_exceptions=True)

    async def _write(self, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )
        try:
            async for data in self._events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
            last = DONE
        except Exception as error:
            # The status line is out, so the error is the stream's last event.
            last = sse(error_object(body_of(error)))
        await send({"type": "http.response.body", "body": last, "more_body": False})
