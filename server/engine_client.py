"""The front end's side of the engine process: start it, feed it, notice when it dies."""

from __future__ import annotations

import asyncio
import itertools
import logging
import multiprocessing
import multiprocessing.connection
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import zmq
import zmq.asyncio

from ..common import messages as m
from ..common.config import EngineConfig
from ..common.errors import EngineDied, SixfoldError
from ..common.sampling import SamplingParams
from .early_engine import EarlyEngine
from .launch import Located

log = logging.getLogger("sixfold.server")

UNIX_PATH_LIMIT = 100  # sun_path holds 104 to 108 bytes


@dataclass(frozen=True, slots=True)
class Wanted:
    """One sequence that the engine shall produce."""

    prompt_ids: list[int]
    params: SamplingParams
    priority: int = 0
    images: Sequence[m.Image] = ()


class Generation:
    """The sequences of one HTTP request: outputs arrive here in order, by sequence index."""

    def __init__(self, client: EngineClient, ids: Sequence[str]) -> None:
        self._client = client
        self._open = {request_id: index for index, request_id in enumerate(ids)}
        self._ids = list(ids)
        self._arrived: list[tuple[int, m.Output]] = []
        self._wake = asyncio.Event()
        self._error: EngineDied | None = None

    async def next(self) -> list[tuple[int, m.Output]]:
        """All outputs since the last call; waits for one. Empty when every sequence has ended.
        Raises EngineDied."""
        while not self._arrived:
            if self._error is not None:
                raise self._error
            if not self._open:
                return []
            self._wake.clear()
            await self._wake.wait()
        arrived, self._arrived = self._arrived, []
        return arrived

    def stop(self, index: int) -> None:
        """End one sequence early; outputs still on their way are dropped."""
        self._abort([self._ids[index]])

    def close(self) -> None:
        """End whatever is still running. Idempotent."""
        self._abort(list(self._open))

    def _abort(self, ids: list[str]) -> None:
        ids = [request_id for request_id in ids if self._open.pop(request_id, None) is not None]
        self._client.forget(ids)

    def deliver(self, output: m.Output) -> None:
        index = self._open.get(output.request_id)
        if index is None:
            return
        if output.finish_reason is not None:
            del self._open[output.request_id]
        self._arrived.append((index, output))
        self._wake.set()

    def fail(self, error: EngineDied) -> None:
        self._open.clear()
        self._error = error
        self._wake.set()


class EngineClient:
    """Owns the engine process and its socket. All methods run on one event loop."""

    def __init__(
        self,
        config: EngineConfig,
        located: Located,
        log_level: str = "warning",
        early: EarlyEngine | None = None,
    ) -> None:
        """`early`: a process that has been started for `config`."""
        self._located = located
        self._config, self._log_level, self._early = config, log_level, early
        self._folder: str | None = None
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.set_hwm(0)
        self._process: multiprocessing.process.BaseProcess | None = None
        self._numbers = itertools.count()
        self._open: dict[str, Generation] = {}
        self._started: asyncio.Future[m.Ready] | None = None
        self._reader: asyncio.Task[None] | None = None
        self._failure: str | None = None
        self.ended = asyncio.Event()
        self.stats: m.EngineStats | None = None
        self.on_loading: Callable[[m.Loading], None] = lambda message: None

    async def start(self) -> m.Ready:
        """Start the process and wait until it can serve. Raises SixfoldError with its sentence."""
        loop = asyncio.get_running_loop()
        endpoint = self._bind()
        self._started = loop.create_future()
        engine = self._early or EarlyEngine(self._config, self._log_level)
        engine.begin(endpoint, self._located)
        self._process = process = engine.process
        self._reader = loop.create_task(self._read())
        threading.Thread(
            target=self._watch, args=(loop, process.sentinel), name="engine-watch", daemon=True
        ).start()
        return await asyncio.shield(self._started)

    def submit(self, wanted: Iterable[Wanted]) -> Generation:
        """Queue sequences; must not be called before `start` returned. Raises EngineDied."""
        if self.ended.is_set():
            raise EngineDied(self.sentence)
        requests = [
            m.AddRequest(
                request_id=str(next(self._numbers)),
                prompt_ids=one.prompt_ids,
                params=one.params,
                priority=one.priority,
                images=list(one.images),
            )
            for one in wanted
        ]
        generation = Generation(self, [request.request_id for request in requests])
        for request in requests:
            self._open[request.request_id] = generation
            self._send(request)
        return generation

    def forget(self, ids: list[str]) -> None:
        """Abort sequences in the engine and drop what it may still send about them."""
        for request_id in ids:
            self._open.pop(request_id, None)
        if ids and not self.ended.is_set():
            self._send(m.Abort(request_ids=ids))

    @property
    def open_sequences(self) -> int:
        return len(self._open)

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def stop(self, drain_seconds: float) -> bool:
        """Let running sequences finish for up to `drain_seconds`, then end the process. True when
        all of them finished. Idempotent."""
        loading = self._started is None or not self._started.done()
        finished = loading or await self._ended_within(m.Drain(), drain_seconds)
        gone = not loading and await self._ended_within(m.Shutdown(), 2.0)
        if not gone and self._process is not None:
            self._process.kill()
            await self._ended_within(None, 2.0)
        self._close()
        return finished and (loading or self._exit_code == 0)

    async def _ended_within(self, message: m.ToEngine | None, seconds: float) -> bool:
        if self._process is None or self.ended.is_set():
            return True
        if message is not None:
            self._send(message)
        try:
            await asyncio.wait_for(self.ended.wait(), seconds)
        except TimeoutError:
            return False
        return True

    def _bind(self) -> str:
        """A private unix socket; loopback TCP where the system has none or its path is too long."""
        if sys.platform != "win32":
            self._folder = tempfile.mkdtemp(prefix="sixfold-")
            path = os.path.join(self._folder, "engine")
            if len(os.fsencode(path)) < UNIX_PATH_LIMIT:
                self._socket.bind(f"ipc://{path}")
                return f"ipc://{path}"
        port = self._socket.bind_to_random_port("tcp://127.0.0.1")
        return f"tcp://127.0.0.1:{port}"

    def _send(self, message: m.ToEngine) -> None:
        # Without a high-water mark a send never waits, so the future is already done.
        self._socket.send(m.encode(message))

    async def _read(self) -> None:
        while True:
            self._handle(m.decode_from_engine(await self._socket.recv()))

    def _handle(self, message: m.FromEngine) -> None:
        if isinstance(message, m.Outputs):
            for output in message.outputs:
                self._deliver(output)
        elif isinstance(message, m.EngineStats):
            self.stats = message
        elif isinstance(message, m.Loading):
            self.on_loading(message)
        elif isinstance(message, m.Ready):
            if self._started is not None and not self._started.done():
                self._started.set_result(message)
        elif isinstance(message, m.Failed):
            self._failure = message.message

    def _deliver(self, output: m.Output) -> None:
        if output.finish_reason is None:
            generation = self._open.get(output.request_id)
        else:
            generation = self._open.pop(output.request_id, None)
        if generation is not None:
            generation.deliver(output)

    def _watch(self, loop: asyncio.AbstractEventLoop, sentinel: int) -> None:
        """Runs in a thread: waits for the end of the process."""
        multiprocessing.connection.wait([sentinel])
        try:
            asyncio.run_coroutine_threadsafe(self._process_ended(), loop)
        except RuntimeError:
            log.debug("the engine ended after the event loop")

    async def _process_ended(self) -> None:
        """Read what the process sent last, then fail whatever is open."""
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        while await self._socket.poll(timeout=50):
            self._handle(m.decode_from_engine(await self._socket.recv()))
        self.ended.set()
        error = EngineDied(self.sentence)
        if self._started is not None and not self._started.done():
            self._started.set_exception(SixfoldError(self.sentence))
            self._started.exception()  # nobody waits for it when loading was called off
        for generation in set(self._open.values()):
            generation.fail(error)
        self._open.clear()

    @property
    def sentence(self) -> str:
        """Why the process ended, for the user."""
        if self._failure is not None:
            return self._failure
        code = self._exit_code
        how = f"by signal {-code}" if code is not None and code < 0 else f"with exit code {code}"
        return f"The engine process has ended {how}."

    @property
    def _exit_code(self) -> int | None:
        """Of the ended process. It may still have to be reaped, which takes no time."""
        if self._process is None:
            return None
        self._process.join(timeout=1)
        return self._process.exitcode

    def _close(self) -> None:
        self._socket.close(linger=0)
        self._context.term()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
