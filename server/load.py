"""A load generator for OpenAI-compatible servers: send synthetic prompts, measure the streams."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx

from ..common.errors import SixfoldError

WORDS = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work number night "
    "point home water room mother area money story fact month lot right study book eye job word "
    "business issue side kind head house service friend father power hour game line end member law"
).split()
"""Common words: most vocabularies hold each of them as one token."""


@dataclass(frozen=True, slots=True)
class Load:
    """What to send. Exactly one of `concurrency` (closed loop) and `rate` (open loop) holds."""

    url: str
    model: str
    endpoint: str = "completions"  # or "chat"
    api_key: str | None = None
    requests: int = 64
    concurrency: int = 8
    rate: float | None = None  # requests a second, at random (Poisson) times
    prompt_tokens: int = 512
    output_tokens: int = 128
    shared_prefix: int = 0  # of the prompt's tokens, so many are equal in all requests
    seed: int = 0


@dataclass(slots=True)
class Sample:
    """One request as the client saw it; times in seconds since it was sent."""

    arrivals: list[float] = field(default_factory=list)  # of every piece of text
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    seconds: float = 0.0
    error: str | None = None

    @property
    def ttft(self) -> float:
        return self.arrivals[0]

    @property
    def tpot(self) -> float:
        """Time per output token after the first."""
        return (self.arrivals[-1] - self.arrivals[0]) / max(1, self.output_tokens - 1)

    @property
    def gaps(self) -> list[float]:
        """Between pieces of text (one token each, for most servers)."""
        return [b - a for a, b in zip(self.arrivals, self.arrivals[1:], strict=False)]


class LoadGenerator:
    def __init__(self, load: Load) -> None:
        headers = {"Authorization": f"Bearer {load.api_key}"} if load.api_key else {}
        self._load = load
        self._random = random.Random(load.seed)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        base = load.url.rstrip("/").removesuffix("/v1")
        self._client = httpx.AsyncClient(
            base_url=base, headers=headers, timeout=None, limits=limits
        )
        self._model = load.model
        self._exact_length = True  # the server understands ignore_eos
        self._words_per_token = 1.0
        self._overhead = 0.0  # tokens that the server adds to any prompt

    async def run(self) -> dict[str, Any]:
        """Calibrate, send everything, and sum up. Raises SixfoldError when nothing answers."""
        async with self._client:
            await self._calibrate()
            shared = self._text(self._load.shared_prefix)
            own = max(1, self._load.prompt_tokens - self._load.shared_prefix)
            prompts = [f"{shared} {self._text(own)}".strip() for _ in range(self._load.requests)]
            begun = time.perf_counter()
            if self._load.rate is None:
                samples = await self._closed_loop(prompts)
            else:
                samples = await self._open_loop(prompts, self._load.rate)
            seconds = time.perf_counter() - begun
        return summary(self._load, self._model, samples, seconds, self._exact_length)

    async def _calibrate(self) -> None:
        """Learn the served model, how many tokens a word has, and whether ignore_eos is known."""
        if not self._model:
            self._model = await self._served()
        sizes: list[int] = []
        for words in (64, 256):
            sample = await self._send(" ".join(self._random.choices(WORDS, k=words)), 1)
            if sample.error is not None and "ignore_eos" in sample.error and self._exact_length:
                self._exact_length = False
                sample = await self._send(" ".join(self._random.choices(WORDS, k=words)), 1)
            if sample.error is not None:
                raise SixfoldError(f"The server refused the first request: {sample.error}")
            sizes.append(sample.prompt_tokens)
        tokens_per_word = (sizes[1] - sizes[0]) / 192
        if tokens_per_word > 0:
            self._words_per_token = 1 / tokens_per_word
            self._overhead = max(0.0, sizes[0] - 64 * tokens_per_word)

    async def _served(self) -> str:
        try:
            answer = await self._client.get("/v1/models")
            return str(answer.json()["data"][0]["id"])
        except (httpx.HTTPError, ValueError, KeyError, IndexError) as error:
            raise SixfoldError(
                f"{self._load.url} does not tell which models it serves ({error}). Is it running? "
                "Or name one with --model."
            ) from None

    def _text(self, tokens: int) -> str:
        words = round((tokens - self._overhead) * self._words_per_token) if tokens else 0
        return " ".join(self._random.choices(WORDS, k=max(0, words)))

    async def _closed_loop(self, prompts: list[str]) -> list[Sample]:
        """Always `concurrency` requests at a time."""
        waiting = iter(prompts)
        samples: list[Sample] = []

        async def worker() -> None:
            for prompt in waiting:
                samples.append(await self._send(prompt, self._load.output_tokens))

        await asyncio.gather(*(worker() for _ in range(self._load.concurrency)))
        return samples

    async def _open_loop(self, prompts: list[str], rate: float) -> list[Sample]:
        """Requests leave at random times, whatever became of the earlier ones."""
        tasks = []
        due = time.perf_counter()
        for prompt in prompts:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.create_task(self._send(prompt, self._load.output_tokens)))
            due += self._random.expovariate(rate)
        return list(await asyncio.gather(*tasks))

    def _body(self, prompt: str, output_tokens: int) -> tuple[str, dict[str, Any]]:
        body: dict[str, Any] = {
            "model": self._model,
            "max_tokens": output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._exact_length:
            body["ignore_eos"] = True
        if self._load.endpoint == "chat":
            return "/v1/chat/completions", body | {
                "messages": [{"role": "user", "content": prompt}]
            }
        return "/v1/completions", body | {"prompt": prompt}

    async def _send(self, prompt: str, output_tokens: int) -> Sample:
        path, body = self._body(prompt, output_tokens)
        sample = Sample()
        begun = time.perf_counter()
        try:
            async with self._client.stream("POST", path, json=body) as answer:
                if answer.status_code != 200:
                    text = (await answer.aread()).decode("utf-8", "replace")
                    sample.error = f"HTTP {answer.status_code}: {text[:300]}"
                    return sample
                async for event in events(answer):
                    _record(sample, event, time.perf_counter() - begun)
        except httpx.HTTPError as error:
            sample.error = f"{type(error).__name__}: {error}"
        sample.seconds = time.perf_counter() - begun
        if sample.error is None and not sample.arrivals:
            sample.error = "the stream held no text"
        return sample


async def events(answer: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events."""
    async for line in answer.aiter_lines():
        if line.startswith("data:") and not line.endswith("[DONE]"):
            yield json.loads(line[5:])


def _record(sample: Sample, event: dict[str, Any], now: float) -> None:
    if "error" in event:
        sample.error = str(event["error"])
        return
    for choice in event.get("choices", ()):
        if choice.get("text") or (choice.get("delta") or {}).get("content"):
            sample.arrivals.append(now)
        elif choice.get("finish_reason") and not sample.arrivals:
            sample.arrivals.append(now)  # its only token had no text of its own
    usage = event.get("usage")
    if usage:
        sample.prompt_tokens = usage["prompt_tokens"]
        sample.output_tokens = usage["completion_tokens"]
        details = usage.get("prompt_tokens_details") or {}
        sample.cached_tokens = details.get("cached_tokens") or 0


def percentile(values: list[float], share: float) -> float:
    """Linear interpolation between the two nearest; 0 for no values."""
    if not values:
        return 0.0
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def _spread(values: list[float]) -> dict[str, float]:
    """Milliseconds."""
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    result = {name: 1000 * percentile(values, share) for name, share in shares.items()}
    return {"mean": 1000 * sum(values) / len(values) if values else 0.0, **result}


def summary(
    load: Load, model: str, samples: list[Sample], seconds: float, exact_length: bool
) -> dict[str, Any]:
    """The figures of a run; latencies in milliseconds, rates a second."""
    good = [sample for sample in samples if sample.error is None]
    output = sum(sample.output_tokens for sample in good)
    prompt = sum(sample.prompt_tokens for sample in good)
    settings = {name: value for name, value in asdict(load).items() if name != "api_key"}
    return {
        "settings": settings | {"model": model, "ignore_eos": exact_length},
        "seconds": seconds,
        "completed": len(good),
        "errors": len(samples) - len(good),
        "first_error": next((sample.error for sample in samples if sample.error), None),
        "prompt_tokens": prompt,
        "cached_tokens": sum(sample.cached_tokens for sample in good),
        "output_tokens": output,
        "requests_per_second": len(good) / seconds,
        "output_tokens_per_second": output / seconds,
        "total_tokens_per_second": (prompt + output) / seconds,
        "ttft_ms": _spread([sample.ttft for sample in good]),
        "tpot_ms": _spread([sample.tpot for sample in good if sample.output_tokens > 1]),
        "itl_ms": _spread([gap for sample in good for gap in sample.gaps]),
        "e2e_ms": _spread([sample.seconds for sample in good]),
        "samples": [asdict(sample) for sample in samples],
    }
