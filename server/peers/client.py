"""One request, and one workload, as a client of an OpenAI-compatible server sees them."""

from __future__ import annotations

import asyncio
import statistics
import time
from dataclasses import dataclass
from typing import Any

import httpx

from ..load import events
from .workloads import output_limit, prompts

SAME_READ_S = 0.0002
"""Pieces that arrive closer than this came in one read of the socket: one arrival."""

TIMEOUT_S = 1800.0

REFUSALS = frozenset({400, 401, 403, 422})


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer; times in seconds since the request was sent."""

    text: str
    output_tokens: int  # as the server counts them, else the number of pieces of text
    prompt_tokens: int | None
    cached_tokens: int | None
    arrivals: tuple[float, ...]
    total_s: float
    error: str | None
    refused: bool = False  # the request itself was at fault: asking again gives the same

    @property
    def first_s(self) -> float:
        """Time to the first text; to the end when there was none."""
        return self.arrivals[0] if self.arrivals else self.total_s

    @property
    def decode_tokens_per_s(self) -> float | None:
        """1 ÷ median gap, times the tokens of a gap (1 for most servers); None for one arrival."""
        gaps = [b - a for a, b in zip(self.arrivals, self.arrivals[1:], strict=False)]
        if not gaps:
            return None
        return (self.output_tokens - 1) / len(gaps) / statistics.median(gaps)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run of one workload on one server; replies in the order of the prompts."""

    workload: str
    round: int
    wall_s: float
    replies: tuple[Reply, ...]

    @property
    def good(self) -> list[Reply]:
        return [reply for reply in self.replies if reply.error is None]

    @property
    def errors(self) -> int:
        return len(self.replies) - len(self.good)

    @property
    def tokens_per_s(self) -> float:
        """Output tokens of the answers that came, over the time of all."""
        return sum(reply.output_tokens for reply in self.good) / self.wall_s


def connection() -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(timeout=TIMEOUT_S, limits=limits)


async def ask(
    client: httpx.AsyncClient, api: str, model: str, prompt: str, output_tokens: int
) -> Reply:
    """Send one chat request and read its stream. Failures become the reply's `error`."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": output_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    reading = _Reading(time.perf_counter())
    try:
        async with client.stream("POST", f"{api}/chat/completions", json=body) as answer:
            if answer.status_code == 200:
                async for event in events(answer):
                    reading.take(event)
            else:
                text = (await answer.aread()).decode("utf-8", "replace")
                reading.error = f"HTTP {answer.status_code}: {text[:300]}"
                reading.refused = answer.status_code in REFUSALS
    except (httpx.HTTPError, ValueError) as error:
        reading.error = f"{type(error).__name__}: {error}".rstrip(": ")
    return reading.reply()


class _Reading:
    """What came of one stream so far."""

    def __init__(self, begun: float) -> None:
        self._begun = begun
        self._text: list[str] = []
        self._arrivals: list[float] = []
        self._usage: dict[str, Any] = {}
        self._finished = False
        self.error: str | None = None
        self.refused = False

    def take(self, event: dict[str, Any]) -> None:
        if event.get("error"):
            self.error = str(event["error"])
        self._usage = event.get("usage") or self._usage
        for choice in event.get("choices") or ():
            piece = _piece(choice.get("delta") or {})
            if piece:
                self._text.append(piece)
            if choice.get("finish_reason"):
                self._finished = True
            # An answer whose only token has no text arrives with its end.
            if piece or (self._finished and not self._arrivals):
                self._arrived(time.perf_counter() - self._begun)

    def _arrived(self, now: float) -> None:
        if not self._arrivals or now - self._arrivals[-1] > SAME_READ_S:
            self._arrivals.append(now)

    def reply(self) -> Reply:
        if self.error is None and not self._arrivals:
            self.error = "the stream held no text"
        details = self._usage.get("prompt_tokens_details") or {}
        return Reply(
            text="".join(self._text),
            output_tokens=self._usage.get("completion_tokens") or len(self._text),
            prompt_tokens=self._usage.get("prompt_tokens"),
            cached_tokens=details.get("cached_tokens"),
            arrivals=tuple(self._arrivals),
            total_s=time.perf_counter() - self._begun,
            error=self.error,
            refused=self.refused,
        )


def _piece(delta: dict[str, Any]) -> str:
    """Text of any kind: some servers send thinking under a name of its own."""
    names = ("reasoning_content", "reasoning", "content")
    return "".join(delta[name] for name in names if isinstance(delta.get(name), str))


async def run(api: str, model: str, workload: str, seed: int) -> Outcome:
    """Send a whole workload and wait for all of it. `seed` is the number of the round."""
    limit = output_limit(workload)
    async with connection() as client:
        texts = prompts(workload, seed)
        start = time.perf_counter()
        if workload == "P":
            replies = [await ask(client, api, model, text, limit) for text in texts]
        else:
            replies = await asyncio.gather(
                *(ask(client, api, model, text, limit) for text in texts)
            )
        wall = time.perf_counter() - start
    return Outcome(workload, seed, wall, tuple(replies))
