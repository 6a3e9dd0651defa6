"""The engine process: receive, step, deliver. Started by `engine_client`, ends with its parent."""

from __future__ import annotations

import faulthandler
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time

import zmq

from ..common import messages as m
from ..common.config import EngineConfig
from ..common.engine import Engine
from ..common.errors import RequestError, SixfoldError
from .launch import Located, Probes, build

log = logging.getLogger("sixfold.engine")

STATS_SECONDS = 1.0
LINGER_MS = 2000


def run(
    endpoint: str,
    config: EngineConfig,
    located: Located,
    log_level: str,
    found: Probes | None = None,
) -> None:
    """Entry point of the process. Signals are the parent's to handle: it drains, then ends us."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.enable()
    logging.basicConfig(level=log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
    _end_with_parent()
    context = zmq.Context()
    socket: zmq.Socket[bytes] = context.socket(zmq.PAIR)
    socket.set_hwm(0)
    socket.connect(endpoint)
    failed = True
    try:
        _serve(socket, config, located, found)
        failed = False
    except SixfoldError as error:
        socket.send(m.encode(m.Failed(message=str(error))))
    except Exception as error:
        log.exception("the engine failed")
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        socket.send(m.encode(m.Failed(message=f"The engine failed: {what} (see the log).")))
    finally:
        socket.close(linger=LINGER_MS)
        context.term()
    if failed:
        raise SystemExit(1)


def _end_with_parent() -> None:
    """A thread that ends this process as soon as the parent is gone, however it went."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def _serve(
    socket: zmq.Socket[bytes], config: EngineConfig, located: Located, found: Probes | None
) -> None:
    last = 0.0

    def progress(stage: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > 0.1 or done >= total:
            last = now
            socket.send(m.encode(m.Loading(stage=stage, done=done, total=total)))

    launched = build(config, located, progress, found)
    try:
        socket.send(m.encode(launched.ready))
        EngineLoop(launched.engine, socket).run()
    finally:
        launched.engine.close()


class EngineLoop:
    """Owns the engine between Ready and the end."""

    def __init__(self, engine: Engine, socket: zmq.Socket[bytes]) -> None:
        self._engine = engine
        self._socket = socket
        self._draining = False
        self._stopped = False
        self._stats_at = 0.0
        self._idle = True
        self._refused: list[m.Output] = []

    def run(self) -> None:
        while not self._stopped:
            self._receive()
            if self._stopped:
                break
            outputs, self._refused = self._refused, []
            if self._engine.has_work:
                outputs += self._engine.step()
            if outputs:
                self._socket.send(m.encode(m.Outputs(outputs=outputs)))
            self._report()
            if self._draining and not self._engine.has_work and not self._refused:
                self._socket.send(m.encode(m.Drained()))
                return

    def _receive(self) -> None:
        """Handle everything that has arrived; wait for it when there is nothing else to do."""
        if not self._engine.has_work and not self._draining:
            self._socket.poll()
        while True:
            try:
                data = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._handle(m.decode_to_engine(data))

    def _handle(self, message: m.ToEngine) -> None:
        if isinstance(message, m.AddRequest):
            self._add(message)
        elif isinstance(message, m.Abort):
            self._engine.abort(message.request_ids)
        elif isinstance(message, m.Drain):
            self._draining = True
        else:
            self._stopped = True

    def _add(self, request: m.AddRequest) -> None:
        if self._draining:
            body = m.ErrorBody(
                "The server is shutting down.",
                "service_unavailable_error",
                code="draining",
                status=503,
                retry_after=5,
            )
            self._refuse(request.request_id, body)
            return
        try:
            self._engine.add(request)
        except RequestError as error:
            retry = getattr(error, "retry_after", None)
            body = m.ErrorBody(
                error.message, error.type, error.param, error.code, error.status, retry
            )
            self._refuse(request.request_id, body)

    def _refuse(self, request_id: str, body: m.ErrorBody) -> None:
        self._refused.append(m.Output(request_id=request_id, finish_reason="error", error=body))

    def _report(self) -> None:
        """Statistics once a second while anything runs, and once when idle begins."""
        now = time.monotonic()
        idle = not self._engine.has_work
        if (idle and not self._idle) or (not idle and now - self._stats_at >= STATS_SECONDS):
            self._stats_at = now
            self._socket.send(m.encode(self._engine.stats()))
        self._idle = idle
