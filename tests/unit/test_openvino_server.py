"""Contract guarded: the small server that puts OpenVINO GenAI beside the peers streams what the
library's pipeline generates, batches requests that run together, and reports its failures. The
pipeline here is a fake with the library's interface: it answers a prompt with its own words."""

from __future__ import annotations

import asyncio
from collections import deque
from enum import Enum
from types import SimpleNamespace
from typing import Any

import httpx

from sixfold.server.peers.client import Reply, ask
from sixfold.server.peers.openvino_server import Decoder, create_app


class Finish(Enum):
    NONE, LENGTH, STOP = range(3)


class Tokenizer:
    """A byte is a token."""

    def apply_chat_template(self, messages: Any, add_generation_prompt: bool) -> str:
        return str(messages[-1]["content"])

    def encode(self, text: str, add_special_tokens: bool) -> Any:
        data = text.encode()
        ids = SimpleNamespace(shape=(1, len(data)), data=data)
        return SimpleNamespace(input_ids=ids)

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")


class Handle:
    def __init__(self, data: bytes, limit: int) -> None:
        self._left = deque(data[:limit])
        self._end = Finish.STOP if len(data) < limit else Finish.LENGTH
        self._ready: deque[Any] = deque()

    def step(self) -> None:
        ids = [self._left.popleft()]
        reason = Finish.NONE if self._left else self._end
        self._ready.append(SimpleNamespace(generated_ids=ids, finish_reason=reason))

    @property
    def finished(self) -> bool:
        return not self._left

    def can_read(self) -> bool:
        return bool(self._ready)

    def read(self) -> dict[int, Any]:
        return {0: self._ready.popleft()}


class Pipeline:
    def __init__(self, expected: int = 1) -> None:
        self._expected = expected  # nothing is computed before so many requests are there
        self.handles: list[Handle] = []
        self.batches: list[int] = []

    def get_tokenizer(self) -> Tokenizer:
        return Tokenizer()

    def get_config(self) -> Any:
        return SimpleNamespace()

    def add_request(self, number: int, ids: Any, config: Any) -> Handle:
        assert not config.do_sample
        if ids.data.startswith(b"refuse"):
            raise RuntimeError("too long")
        self.handles.append(Handle(ids.data, config.max_new_tokens))
        return self.handles[-1]

    def step(self) -> None:
        if len(self.handles) < self._expected:
            return
        running = [handle for handle in self.handles if not handle.finished]
        self.batches.append(len(running))
        for handle in running:
            handle.step()


def replies(pipeline: Pipeline, *prompts: str, limit: int = 100) -> list[Reply]:
    async def run() -> list[Reply]:
        transport = httpx.ASGITransport(create_app(pipeline))
        async with httpx.AsyncClient(transport=transport) as client:
            jobs = [ask(client, "http://h/v1", "bench", text, limit) for text in prompts]
            return list(await asyncio.gather(*jobs))

    return asyncio.run(run())


def test_streams_the_pipelines_text() -> None:
    (reply,) = replies(Pipeline(), "Grüße, 世界!")
    size = len("Grüße, 世界!".encode())
    assert (reply.text, reply.error) == ("Grüße, 世界!", None)
    assert (reply.output_tokens, reply.prompt_tokens) == (size, size)
    (reply,) = replies(Pipeline(), "abcdef", limit=3)
    assert (reply.text, reply.output_tokens) == ("abc", 3)


def test_requests_share_steps_and_failures_are_their_own() -> None:
    pipeline = Pipeline(expected=2)
    texts = ["first " * 50, "refuse this", "second " * 50]
    first, refused, second = replies(pipeline, *texts, limit=200)
    assert (first.text, second.text) == (texts[0][:200], texts[2][:200])
    assert refused.error is not None
    assert "too long" in refused.error
    assert pipeline.batches == [2] * 200


def test_only_greedy_streams() -> None:
    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(Pipeline()))
        async with httpx.AsyncClient(transport=transport, base_url="http://h") as client:
            body = {"messages": [], "stream": True, "temperature": 1}
            return await client.post("/v1/chat/completions", json=body)

    assert asyncio.run(run()).status_code == 400


def test_decoder_holds_back_half_a_character() -> None:
    decoder = Decoder(Tokenizer())
    pieces = [decoder.add([byte]) for byte in "né🙂".encode()]
    assert pieces == ["n", "", "é", "", "", "", "🙂"]
