"""The loop of the engine: schedule, submit, collect, deliver. Drives any Executor."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from time import perf_counter

from ..platforms.interface import Executor, ExecutorInfo
from .config import EngineConfig
from .errors import CacheCorrupted, EngineDied
from .messages import AddRequest, EngineStats, ErrorBody, Output
from .scheduler.scheduler import Scheduler
from .telemetry.load import LoadCounters

log = logging.getLogger("sixfold.engine")


class Engine:
    """Owns the executor once it is loaded. All methods are called from the thread that loaded it.

    Where the platform allows, one step is in flight while the next is built. When a step fails,
    every open request ends with finish_reason "error", and the next `step` or `add` raises
    EngineDied.
    """

    def __init__(
        self,
        executor: Executor,
        info: ExecutorInfo,
        config: EngineConfig,
        eos_token_ids: frozenset[int],
    ) -> None:
        self._executor = executor
        self._counters = LoadCounters()
        self._scheduler = Scheduler(info, config, eos_token_ids, self._counters)
        self._depth = 2 if info.overlap and config.overlap else 1
        self._outputs: list[Output] = []  # of requests that were aborted between steps
        self._dead: str | None = None
        self._told = False  # the death has been raised once
        self._closed = False

    def add(self, request: AddRequest) -> None:
        """Queue a request. Raises RequestError, ContextLengthExceeded, QueueFull or EngineDied."""
        self._require_life()
        self._scheduler.add(request)

    def abort(self, request_ids: Iterable[str]) -> None:
        """End requests at once; the next `step` delivers their last message."""
        if self._dead is not None:
            return
        try:
            self._outputs += self._scheduler.abort(request_ids)
        except CacheCorrupted as error:
            self._outputs += self._die(error)

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do or to tell."""
        if self._dead is not None:
            return not self._told
        scheduler = self._scheduler
        rows = scheduler.waiting or scheduler.running
        return bool(self._outputs or scheduler.in_flight or rows)

    def step(self) -> list[Output]:
        """Advance by one step and return what it brought. Never waits without work. Raises
        EngineDied after a failure has been delivered."""
        outputs, self._outputs = self._outputs, []
        if self._dead is not None and outputs:
            return outputs
        self._require_life()
        began = perf_counter()
        try:
            self._submit()
            if self._scheduler.in_flight:
                for output in self._scheduler.apply(self._executor.collect()):
                    outputs.append(output)  # one by one: kept even if a later row fails
        except Exception as error:
            outputs += self._die(error)
        self._counters.step_seconds += perf_counter() - began
        return outputs

    def stats(self) -> EngineStats:
        scheduler = self._scheduler
        pages = {
            pool.group.name: [pool.free, pool.evictable, pool.pinned, pool.total]
            for pool in scheduler.cache.pools
        }
        return self._counters.snapshot(scheduler.waiting, scheduler.running, pages)

    def close(self) -> None:
        """Release the device. Idempotent; open requests get no further message."""
        if not self._closed:
            self._closed = True
            self._dead = self._dead or "The engine was closed."
            self._told = True
            self._executor.close()

    def _submit(self) -> None:
        while self._scheduler.in_flight < self._depth:
            batch = self._scheduler.schedule()
            if batch is None:
                return
            self._executor.submit(batch)

    def _die(self, error: Exception) -> list[Output]:
        log.error("a step failed", exc_info=error)
        self._dead = f"The engine failed and must be restarted: {type(error).__name__}: {error}"
        body = ErrorBody(message=self._dead, code="engine_died", status=500)
        failed = self._scheduler.open_requests
        for _ in failed:
            self._counters.finish("error")
        return [Output(request_id=i, finish_reason="error", error=body) for i in failed]

    def _require_life(self) -> None:
        if self._dead is not None:
            self._told = True
            raise EngineDied(self._dead)
