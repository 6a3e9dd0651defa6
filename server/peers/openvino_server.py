"""OpenVINO GenAI behind just enough of an OpenAI-compatible API to be measured like the others.

    python -m sixfold.server.peers.openvino_server MODEL --port PORT

MODEL is a .gguf file or a directory with openvino_model.xml. Only greedy, streamed chat requests.
The library has continuous batching and a prefix cache, but no server that pip installs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import queue
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

PRECISIONS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
NAME = "bench"


@dataclass(slots=True)
class Running:
    """One request in the pipeline. `tokens` gets lists of new ids, then None or an error."""

    prompt: str
    limit: int
    loop: asyncio.AbstractEventLoop
    tokens: asyncio.Queue[list[int] | Exception | None] = field(default_factory=asyncio.Queue)
    handle: Any = None
    prompt_tokens: int = 0

    def put(self, item: list[int] | Exception | None) -> None:
        self.loop.call_soon_threadsafe(self.tokens.put_nowait, item)


class Batcher:
    """Owns the pipeline on one thread; sleeps while there is nothing to do."""

    def __init__(self, pipeline: Any) -> None:
        self.tokenizer = pipeline.get_tokenizer()
        self._pipeline = pipeline
        self._arrived: queue.SimpleQueue[Running] = queue.SimpleQueue()
        self._running: list[Running] = []
        self._count = 0
        threading.Thread(target=self._serve, daemon=True).start()

    def add(self, request: Running) -> None:
        self._arrived.put(request)

    def _serve(self) -> None:
        while True:
            while not self._running or not self._arrived.empty():
                self._begin(self._arrived.get())
            try:
                self._pipeline.step()
            except Exception as error:
                for request in self._running:
                    request.put(error)
                self._running = []
            self._running = [request for request in self._running if not self._deliver(request)]

    def _begin(self, request: Running) -> None:
        config = self._pipeline.get_config()
        config.max_new_tokens, config.do_sample = request.limit, False
        try:
            ids = self.tokenizer.encode(request.prompt, add_special_tokens=False).input_ids
            request.prompt_tokens = int(ids.shape[1])
            request.handle = self._pipeline.add_request(self._count, ids, config)
        except Exception as error:
            request.put(error)
            return
        self._count += 1
        self._running.append(request)

    def _deliver(self, request: Running) -> bool:
        """Pass on what is new; true when it was the last."""
        while request.handle.can_read():
            for output in request.handle.read().values():
                request.put(list(output.generated_ids))
                if output.finish_reason.name != "NONE":
                    request.put(None)
                    return True
        return False


class Decoder:
    """Ids to text piece by piece: decodes from a little before the new ones, as spaces depend on
    what came before, and holds back incomplete characters."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._begin = self._read = 0

    def add(self, ids: list[int]) -> str:
        self._ids += ids
        before = self._text(self._ids[self._begin : self._read])
        text = self._text(self._ids[self._begin :])
        if text.endswith("\ufffd") or len(text) <= len(before):
            return ""
        self._begin, self._read = self._read, len(self._ids)
        return text[len(before) :]

    def _text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids)) if ids else ""


def create_app(pipeline: Any) -> Starlette:
    batcher = Batcher(pipeline)

    async def chat(request: Request) -> Response:
        body = await request.json()
        if not body.get("stream") or body.get("temperature"):
            return JSONResponse({"error": {"message": "only greedy streams are served"}}, 400)
        prompt = batcher.tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True)
        running = Running(prompt, body["max_tokens"], asyncio.get_running_loop())
        batcher.add(running)
        return StreamingResponse(_events(running, batcher), media_type="text/event-stream")

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": NAME, "object": "model"}]})

    return Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/models", models),
        ]
    )


async def _events(running: Running, batcher: Batcher) -> AsyncIterator[str]:
    decoder, count = Decoder(batcher.tokenizer), 0
    while (ids := await running.tokens.get()) is not None:
        if isinstance(ids, Exception):
            yield _event({"error": {"message": str(ids)}})
            return
        count += len(ids)
        if text := decoder.add(ids):
            yield _event({"choices": [{"index": 0, "delta": {"content": text}}]})
    reason = "length" if count >= running.limit else "stop"
    yield _event({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
    usage = {"prompt_tokens": running.prompt_tokens, "completion_tokens": count}
    yield _event({"choices": [], "usage": usage})
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def main() -> None:
    import openvino_genai
    import uvicorn

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--dtype", choices=PRECISIONS, help="of the arithmetic and the cache")
    parser.add_argument("--device", default="CPU", help="as the library names it")
    asked = parser.parse_args()
    scheduling = openvino_genai.SchedulerConfig()
    scheduling.enable_prefix_caching = True
    properties = {}
    if asked.dtype:
        precision = PRECISIONS[asked.dtype]
        properties = {"INFERENCE_PRECISION_HINT": precision, "KV_CACHE_PRECISION": precision}
    pipeline = openvino_genai.ContinuousBatchingPipeline(
        asked.model, scheduling, asked.device, properties
    )
    uvicorn.run(create_app(pipeline), host="127.0.0.1", port=asked.port, log_level="warning")


if __name__ == "__main__":
    main()
