"""The thread that an executor loads and runs on, with the steps under way. For every framework."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from .interface import Status, Support

R = TypeVar("R")
T = TypeVar("T")


class DeviceThread(Generic[T]):
    """Work runs in the order given, on one thread. A step's exception surfaces where the step is
    taken, and `health` remembers it. T: what a step gives."""

    def __init__(self) -> None:
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="sixfold-device")
        self._steps: deque[Future[T]] = deque()
        self._failure: BaseException | None = None
        self._closed = False

    def run(self, work: Callable[..., R], *args: Any) -> R:
        """On the thread; waits for the result."""
        return self._worker.submit(work, *args).result()

    def start(self, step: Callable[..., T], *args: Any) -> None:
        """Returns at once."""
        self._steps.append(self._worker.submit(step, *args))

    def take(self, read: Callable[[T], R]) -> R:
        """`read`, called here, of what the oldest step gave. Raises RuntimeError if none is
        pending; re-raises what the step or `read` raised."""
        if not self._steps:
            raise RuntimeError("no step is pending")
        try:
            return read(self._steps.popleft().result())
        except BaseException as error:
            self._failure = error
            raise

    def health(self, loaded: bool) -> Support:
        if self._closed:
            return Support(Status.NO, "the executor is closed")
        if self._failure is not None:
            return Support(Status.NO, f"a step failed: {self._failure!r}")
        if not loaded:
            return Support(Status.NO, "no model is loaded")
        return Support(Status.YES, "steps run")

    def close(self, release: Callable[[], None]) -> None:
        """Abandons the steps that have not begun; `release` runs last on the thread. Idempotent."""
        if self._closed:
            return
        self._closed = True
        for step in self._steps:
            step.cancel()
        self._worker.submit(release)
        self._worker.shutdown(wait=True)
        self._steps.clear()
