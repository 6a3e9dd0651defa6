"""One serving process from its start to its end: load, serve, drain, exit code."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import uvicorn

from ..common.checkpoint.checkpoint import open_checkpoint
from ..common.checkpoint.tokenizer import Tokenizer, load_tokenizer
from ..common.config import EngineConfig
from ..common.errors import SixfoldError
from ..common.messages import Loading, Ready
from .app import create_app
from .early_engine import EarlyEngine
from .engine_client import EngineClient
from .images import ImageReader, NoImages, open_reader
from .launch import Located, locate, served_name
from .listener import HttpProtocol, address_of
from .service import HttpOptions, Loaded, Phase, Service

log = logging.getLogger("sixfold.server")

FLUSH_SECONDS = 5
"""How long answers that are complete may take to reach their clients at the end."""


@dataclass(frozen=True, slots=True)
class ServeOptions:
    engine: EngineConfig
    http: HttpOptions = field(default_factory=HttpOptions)
    served_name: str | None = None
    chat_template: str | None = None  # the template's text
    drain_seconds: float = 30.0
    log_level: str = "info"


class Reporter(Protocol):
    """What the person at the terminal is told."""

    def loading(self, message: Loading) -> None:
        """Progress, several times a second."""
        ...

    def ready(self, service: Service, address: str) -> None:
        """Called once, when requests can be served."""
        ...

    def failed(self, sentence: str) -> None:
        """The reason why the server ends."""
        ...

    def draining(self, sequences: int) -> None:
        """A stop was asked for while so many sequences run."""
        ...


class _Uvicorn(uvicorn.Server):
    """Leaves signals to us: a stop drains first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(
    options: ServeOptions,
    listener: socket.socket,
    reporter: Reporter,
    early: EarlyEngine | None = None,
) -> int:
    """Serve until a signal or the engine's death; the result is the process's exit code."""
    server = Server(options, listener, reporter, early)
    config = server.uvicorn.config
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        return runner.run(server.run())


class Server:
    def __init__(
        self,
        options: ServeOptions,
        listener: socket.socket,
        reporter: Reporter,
        early: EarlyEngine | None = None,
    ) -> None:
        self._options = options
        self._early = early
        self._listener = listener
        self._reporter = reporter
        self.service = Service(options.http)
        self._client: EngineClient | None = None
        self._stop = asyncio.Event()
        self.uvicorn = _Uvicorn(
            uvicorn.Config(
                create_app(self.service),
                http=HttpProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=options.log_level == "debug",
                server_header=False,
                timeout_keep_alive=75,
                timeout_graceful_shutdown=FLUSH_SECONDS,
            )
        )

    async def run(self) -> int:
        with self._signals():
            http = asyncio.create_task(self.uvicorn.serve([self._listener]))
            try:
                return await self._serve(http)
            finally:
                if self._client is not None:
                    await self._client.stop(0)
                self.uvicorn.should_exit = True
                await http

    async def _serve(self, http: asyncio.Task[None]) -> int:
        """Load, then wait for the first reason to end."""
        load = asyncio.create_task(self._load())
        stop = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait((load, stop, http), return_when=asyncio.FIRST_COMPLETED)
            if not load.done():
                return 0 if stop.done() else 1
            client = load.result()
            self._reporter.ready(self.service, address_of(self._listener))
            died = asyncio.create_task(client.ended.wait())
            await asyncio.wait((stop, died, http), return_when=asyncio.FIRST_COMPLETED)
            if stop.done() and not died.done():
                return await self._drain(client)
            died.cancel()
        except SixfoldError as error:
            self.service.phase = Phase.DEAD
            self._reporter.failed(str(error))
            return 1
        finally:
            for task in (load, stop):
                task.cancel()
            await asyncio.gather(load, stop, return_exceptions=True)
        self.service.phase = Phase.DEAD
        self._reporter.failed(client.sentence)
        return 1

    async def _load(self) -> EngineClient:
        """Find the model, then load weights (in the engine process) and tokenizer side by side."""
        options = self._options
        loop = asyncio.get_running_loop()

        def progress(stage: str, done: int, total: int) -> None:
            message = Loading(stage=f"fetching {stage}", done=done, total=total)
            loop.call_soon_threadsafe(self._loading, message)

        located = await asyncio.to_thread(locate, options.engine.model, progress)
        self._client = client = EngineClient(
            options.engine, located, options.log_level, self._early
        )
        client.on_loading = self._loading
        text = asyncio.create_task(asyncio.to_thread(self._tokenizer, located))
        try:
            ready = await client.start()
            tokenizer, name = await text
            images = await asyncio.to_thread(self._images, located, tokenizer, ready)
        finally:
            text.cancel()
            await asyncio.gather(text, return_exceptions=True)
        self.service.model = name
        self.service.metrics.stats = lambda: client.stats
        self.service.open(Loaded(client, ready, tokenizer, int(time.time()), images))
        return client

    def _tokenizer(self, located: Located) -> tuple[Tokenizer, str]:
        checkpoint = open_checkpoint(located.path)
        tokenizer = load_tokenizer(checkpoint)
        if self._options.chat_template is not None:
            tokenizer.use_chat_template(self._options.chat_template)
        name = self._options.served_name or served_name(self._options.engine.model, checkpoint)
        return tokenizer, name

    def _images(
        self, located: Located, tokenizer: Tokenizer, ready: Ready
    ) -> ImageReader | NoImages:
        http = self._options.http
        checkpoint = open_checkpoint(located.path)
        found = open_reader(checkpoint, tokenizer, ready, http.max_body_bytes, http.fetch_images)
        if isinstance(found, NoImages) and ready.images is not None:
            log.warning("images are refused: %s", found.reason)
        return found

    def _loading(self, message: Loading) -> None:
        self.service.loading = message
        self._reporter.loading(message)

    async def _drain(self, client: EngineClient) -> int:
        """Refuse new requests and let the running ones finish; a second signal cuts that short."""
        self.service.phase = Phase.DRAINING
        self._reporter.draining(client.open_sequences)
        self._stop.clear()
        again = asyncio.create_task(self._stop.wait())
        drained = asyncio.create_task(client.stop(self._options.drain_seconds))
        await asyncio.wait((again, drained), return_when=asyncio.FIRST_COMPLETED)
        again.cancel()
        if not drained.done():
            drained.cancel()
            await asyncio.gather(drained, return_exceptions=True)
            return 1
        return 0 if drained.result() else 1

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()

        def stop(number: int, frame: object) -> None:
            loop.call_soon_threadsafe(self._stop.set)

        handlers = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
