"""The servers that a comparison starts: their start, their pauses, their memory, their end.

Each runs in a session of its own, so that Ctrl-C reaches only us and we stop them in order. A
server that is not being measured is suspended: an idle engine may poll, and would take the cores
of the one that is measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from ...common.errors import SixfoldError
from .client import ask, connection
from .launchers import Peer, free_port

START_LIMIT_S = 900.0
STOP_LIMIT_S = 15.0
POLL_S = 0.05


class PeerFailed(SixfoldError):
    """A peer that did not start: the reason, with the last lines of its log."""


class Server:
    """One running peer of ours, with its child processes."""

    def __init__(self, peer: Peer, log: Path) -> None:
        """Raises PeerFailed when the program cannot be run."""
        self.peer, self.log = peer.on(free_port()), log
        self.cold_start_s = 0.0  # launch to first token
        self._begun = time.perf_counter()
        with log.open("wb") as output:
            try:
                self._popen = subprocess.Popen(
                    self.peer.command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                raise PeerFailed(f"{peer.command[0]} cannot be run: {error.strerror}") from None
        self._process = psutil.Process(self._popen.pid)

    @property
    def alive(self) -> bool:
        return self._popen.poll() is None

    async def first_token(self) -> None:
        """Wait for an answer to a first request. Raises PeerFailed."""
        error: str | None = "it was not asked"
        async with connection() as client:
            try:
                async with asyncio.timeout(START_LIMIT_S):
                    while error is not None:
                        if not self.alive:
                            code = self._popen.returncode
                            raise PeerFailed(self.failure(f"it ended with exit code {code}"))
                        reply = await ask(client, self.peer.api, self.peer.model, "Hi", 1)
                        if reply.refused:
                            raise PeerFailed(self.failure(f"it refuses to chat ({reply.error})"))
                        if error := reply.error:
                            await asyncio.sleep(POLL_S)
            except TimeoutError:
                limit = f"no answer within {START_LIMIT_S:.0f} s ({error})"
                raise PeerFailed(self.failure(limit)) from None
        self.cold_start_s = time.perf_counter() - self._begun

    def failure(self, what: str, lines: int = 15) -> str:
        """`what`, and the end of the log below it."""
        text = self.log.read_text("utf-8", "replace").rstrip().splitlines()[-lines:]
        return "\n".join([f"{what}; the end of {self.log}:", *(f"    {line}" for line in text)])

    def suspend(self) -> None:
        for process in self._tree():
            with contextlib.suppress(psutil.Error):
                process.suspend()

    def resume(self) -> None:
        for process in self._tree():
            with contextlib.suppress(psutil.Error):
                process.resume()

    def resident_bytes(self) -> int:
        """Memory of the tree. Pages that its processes share count once for each of them."""
        total = 0
        for process in self._tree():
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
        return total

    def ask_to_stop(self) -> list[psutil.Process]:
        """Send SIGTERM; returns the processes that have to be gone."""
        self.resume()  # a suspended process would not see the signal
        tree = self._tree()
        with contextlib.suppress(ProcessLookupError):
            self._popen.terminate()
        return tree

    def end(self) -> None:
        """SIGKILL to what is left of its session: orphans are in no tree. Returns when reaped."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()

    def _tree(self) -> list[psutil.Process]:
        try:
            return [self._process, *self._process.children(recursive=True)]
        except psutil.Error:
            return []


class Crew:
    """All servers of a comparison; leaving the context ends them, whatever happened."""

    def __init__(self) -> None:
        self._servers: dict[str, Server] = {}

    def start(self, peer: Peer, log: Path) -> Server:
        """Start, wait for the first token, and suspend. Raises PeerFailed; then it is stopped."""
        server = Server(peer, log)
        self._servers[peer.name] = server
        try:
            asyncio.run(server.first_token())
        except PeerFailed:
            del self._servers[peer.name]
            stop([server])
            raise
        server.suspend()
        return server

    @contextlib.contextmanager
    def turn(self, name: str) -> Iterator[None]:
        """Only this peer runs. A server that is not ours runs anyway."""
        server = self._servers.get(name)
        if server is None:
            yield
            return
        server.resume()
        try:
            yield
        finally:
            server.suspend()

    def servers(self) -> dict[str, Server]:
        return dict(self._servers)

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        stop(list(self._servers.values()))


def stop(servers: list[Server]) -> None:
    """SIGTERM to all, and after a while, or at a second Ctrl-C, SIGKILL to what is left."""
    trees = [server.ask_to_stop() for server in servers]
    alive = [process for tree in trees for process in tree]
    try:
        _, alive = psutil.wait_procs(alive, timeout=STOP_LIMIT_S)
    finally:
        for process in alive:
            with contextlib.suppress(psutil.Error):
                process.kill()
        for server in servers:
            server.end()
