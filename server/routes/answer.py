"""Answering a completion request, streamed or whole; the dialect gives the JSON its shape."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ...common.text.logprobs import TokenEntry, chat_entry
from ...common.text.output import TextDelta
from ..generation import Choice, Event, Run
from ..protocol import Sampled
from ..responses import EventStream, json_response, sse, while_connected
from ..service import Service


class Dialect(ABC):
    """How one endpoint spells its answers. One object per request."""

    object: str
    chunk_object: str
    id_prefix: str

    def __init__(self, service: Service, body: Sampled, run: Run) -> None:
        self.run = run
        self.body = body
        self._head = {
            "id": self.id_prefix + uuid.uuid4().hex,
            "created": int(time.time()),
            "model": service.model,
            "system_fingerprint": service.fingerprint,
        }

    @abstractmethod
    def whole(self, choice: Choice, text: str, tokens: list[TokenEntry], reason: str) -> Any:
        """One element of `choices` of a whole answer."""

    @abstractmethod
    def parts(self, choice: Choice, delta: TextDelta, first: bool) -> list[dict[str, Any]]:
        """Elements of `choices` of the chunks for one delta."""

    def answer(self, choices: list[Any], usage: dict[str, Any]) -> dict[str, Any]:
        return {**self._head, "object": self.object, "choices": choices, "usage": usage}

    def chunk(self, choices: list[Any], usage: dict[str, Any] | None = None) -> bytes:
        content = {**self._head, "object": self.chunk_object, "choices": choices}
        if self.body.wants_usage:
            content["usage"] = usage
        return sse(content)

    def prompt_logprobs(self, choice: Choice) -> dict[str, Any]:
        """The extra field of a choice whose request asked for `prompt_logprobs`."""
        if self.body.prompt_logprobs is None or choice.prompt_logprobs is None:
            return {}
        names = self.run.tokenizer
        given = choice.prompt_logprobs
        return {"prompt_logprobs": [g if g is None else chat_entry(names, g) for g in given]}


async def answer(request: Request, dialect: Dialect) -> Response:
    """Run to the end, or start a stream once there is something to send: until then an error
    still gets its own status code."""
    run = dialect.run
    try:
        if dialect.body.stream:
            first = await while_connected(request, run.events())
            return EventStream(run, _stream(dialect, first))
        return json_response(await while_connected(request, _whole(dialect)))
    except BaseException:
        run.close()
        raise


async def _whole(dialect: Dialect) -> dict[str, Any]:
    run = dialect.run
    texts: list[list[str]] = [[] for _ in run.choices]
    tokens: list[list[TokenEntry]] = [[] for _ in run.choices]
    reasons = [""] * len(run.choices)
    while events := await run.events():
        for choice, delta in events:
            texts[choice.index].append(delta.text)
            tokens[choice.index] += delta.tokens
            reasons[choice.index] = delta.finish_reason or ""
    run.close()
    choices = [
        dialect.whole(choice, "".join(text), entries, reason)
        for choice, text, entries, reason in zip(run.choices, texts, tokens, reasons, strict=True)
    ]
    return dialect.answer(choices, run.usage())


async def _stream(dialect: Dialect, events: list[Event]) -> AsyncIterator[bytes]:
    run = dialect.run
    seen: set[int] = set()
    while events:
        data = b""
        for choice, delta in events:
            for part in dialect.parts(choice, delta, choice.index not in seen):
                data += dialect.chunk([part])
            seen.add(choice.index)
        yield data
        events = await run.events()
    if dialect.body.wants_usage:
        yield dialect.chunk([], run.usage())
