"""The engine's process, started before its parent knows what it will run.

A framework takes seconds to import, and so does the HTTP stack. Each process imports its own while
the other does the same.
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from .import_heap import uncollected

if TYPE_CHECKING:  # importing these takes longer than starting the process
    from ..common.config import EngineConfig
    from .launch import Located

log = logging.getLogger("sixfold.engine")


class EarlyEngine:
    """A process that prepares for `config` and waits for `begin`. Whoever made it closes it, unless
    it has begun: then it belongs to whom it serves."""

    def __init__(self, config: EngineConfig, log_level: str) -> None:
        # Spawn, never fork: device runtimes and threads do not survive a fork.
        context = multiprocessing.get_context("spawn")
        mine, theirs = context.Pipe()
        self._pipe: Connection = mine
        self.process = context.Process(
            target=_prepare, args=(theirs, config, log_level), name="sixfold-engine"
        )
        self.process.start()
        theirs.close()
        self._begun = False

    def begin(self, endpoint: str, located: Located) -> None:
        """Load the model and serve it at `endpoint`."""
        self._begun = True
        # A process that has died already is reported by its sentinel.
        try:
            self._pipe.send((endpoint, located))
        except OSError:
            log.debug("the engine ended before it began")
        self._pipe.close()

    def close(self) -> None:
        """End a process that has not begun. Idempotent."""
        if not self._begun:
            self._pipe.close()
            self.process.kill()
            self.process.join()


def _prepare(pipe: Connection, config: EngineConfig, log_level: str) -> None:
    """What the process runs; imports the engine here and not in the front end."""
    # Signals are the parent's to handle: it drains, then ends us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with uncollected():
        from .engine_process import run
        from .launch import warm_up

        found = warm_up(config)
    try:
        endpoint, located = pipe.recv()
    except EOFError:
        return
    run(endpoint, config, located, log_level, found)
