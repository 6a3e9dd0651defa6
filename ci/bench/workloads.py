"""The workloads that every peer gets: chat requests of random words, greedy, streamed over HTTP.

A   one stream, about 512 prompt tokens -> 128
B   8 concurrent of the same             C   32 concurrent of the same
D   16 requests that share about 1,024 tokens (+ about 64 of their own) -> 16, cold
W   the same requests again, warm
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from dataclasses import dataclass

import httpx

WORDS = """
river stone winter market garden bridge letter window morning captain silver forest engine
harbor village thunder candle orchard ribbon valley compass lantern meadow pepper saddle
copper hammer island jacket kettle ladder mirror needle ocean parcel quarry rocket sailor
""".split()


@dataclass(frozen=True, slots=True)
class Reply:
    text: str
    tokens: int  # as the server counts them, else the number of chunks with text
    first_s: float  # time to the first chunk with text; to the end when there was none
    total_s: float
    cached_tokens: int | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run of one workload on one server."""

    output_tokens: int
    wall_s: float
    ttft_s: float  # median over requests
    texts: tuple[str, ...]
    cached_tokens: int | None

    @property
    def tokens_per_s(self) -> float:
        return self.output_tokens / self.wall_s


def words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(count))


def prompts(workload: str, seed: int) -> list[str]:
    """Equal for every peer in a round; a new seed gives prompts that no cache has seen."""
    rng = random.Random(f"{seed}/{'D' if workload == 'W' else workload}")
    ask = "Write a long story that uses these words: "
    if workload in "ABC":
        return [ask + words(rng, 465) for _ in range({"A": 1, "B": 8, "C": 32}[workload])]
    shared = ask + words(rng, 992)
    return [f"{shared} {words(rng, 60)}" for _ in range(16)]


def output_limit(workload: str) -> int:
    return 128 if workload in "ABC" else 16


async def one_request(
    client: httpx.AsyncClient, base: str, model: str, prompt: str, limit: int
) -> Reply:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": limit,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    start, first, text, chunks, usage = time.perf_counter(), 0.0, [], 0, {}
    async with client.stream("POST", f"{base}/v1/chat/completions", json=body) as reply:
        if reply.status_code != 200:
            raise RuntimeError(f"{base}: {reply.status_code} {(await reply.aread())[:300]!r}")
        async for line in reply.aiter_lines():
            if not line.startswith("data:") or line.endswith("[DONE]"):
                continue
            event = json.loads(line[5:])
            usage = event.get("usage") or usage
            for choice in event.get("choices") or []:
                if piece := (choice.get("delta") or {}).get("content"):
                    first = first or time.perf_counter() - start
                    text.append(piece)
                    chunks += 1
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    tokens = usage.get("completion_tokens") or chunks
    total = time.perf_counter() - start
    return Reply("".join(text), tokens, first or total, total, cached)


async def run(base: str, model: str, workload: str, seed: int) -> Outcome:
    """Send the whole workload at once and wait for all of it."""
    limit = output_limit(workload)
    async with httpx.AsyncClient(timeout=1800, limits=httpx.Limits(max_connections=64)) as client:
        start = time.perf_counter()
        jobs = [one_request(client, base, model, p, limit) for p in prompts(workload, seed)]
        replies = await asyncio.gather(*jobs)
        wall = time.perf_counter() - start
    cached = [r.cached_tokens for r in replies if r.cached_tokens is not None]
    return Outcome(
        sum(r.tokens for r in replies), wall, statistics.median(r.first_s for r in replies),
        tuple(r.text for r in replies), sum(cached) if cached else None,
    )  # fmt: skip
