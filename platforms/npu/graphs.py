"""Graphs of torch_npu (`torch.npu.NPUGraph`), of which some operations take numbers from the host.

A recording keeps such numbers as they were. So each of these calls is recorded as a task group, and
before a replay it is made again, on a stream of its own, with the numbers of the step's plan; the
recording waits for that. Source: op-plugin's page `torch_npu-npu-graph_task_update_begin.md` and
CANN's guide "task update" (aclmdlRICaptureTaskUpdateBegin). Not yet run on a device.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from torch import Tensor

from ...common.errors import KernelError
from ..interface import Decision, LoadProgress
from ..judgement import numbers
from ..torch_runtime.device import TorchDevice
from ..torch_runtime.graph_runner import GraphRunner, Work
from ..torch_runtime.step_program import NotCaptured, StepProgram
from ..torch_runtime.stream_graphs import StreamGraphs
from .library import PACKAGE, refusal

OLDEST_DRIVER = (25, 0)
"""Whose task groups can be updated, by CANN's page."""

Arguments = Callable[[], dict[str, Any]]
"""What a call is given, with the host's numbers as they are now. Tensors are always the same."""


@dataclass(frozen=True, slots=True)
class Task:
    call: Callable[..., Any]
    arguments: Arguments
    handle: Any


@dataclass(slots=True)
class Recorded:
    """The tasks of one recording. It waits once, before the first: events of this kind are few."""

    event: Any
    tasks: list[Task] = field(default_factory=list)


_recorded: ContextVar[Recorded | None] = ContextVar("recorded", default=None)


def launch(call: Callable[..., Any], arguments: Arguments) -> None:
    """`call(**arguments())`, and again so before each replay of a recording that holds it. It is
    one operation that writes into tensors it is given."""
    npu = import_module(PACKAGE).npu
    recorded = _recorded.get()
    if recorded is None or not npu.is_current_stream_capturing():
        call(**arguments())
        return
    stream = npu.current_stream()
    if not recorded.tasks:
        recorded.event.wait(stream)
        recorded.event.reset(stream)
    npu.graph_task_group_begin(stream)
    call(**arguments())
    recorded.tasks.append(Task(call, arguments, npu.graph_task_group_end(stream)))


class TaskGraphs(StreamGraphs):
    """Other threads of the process may use the device while this one records."""

    def __init__(self, device: TorchDevice) -> None:
        npu = import_module(PACKAGE).npu
        super().__init__(device.torch_device, npu, "NPUGraph", capture_error_mode="thread_local")
        self._npu = npu
        self._facts = device.facts
        self._updates: Any = None

    def capture(
        self,
        program: StepProgram,
        max_rows: int,
        max_tokens: int,
        progress: LoadProgress | None,
    ) -> tuple[GraphRunner, Decision]:
        """Raises NotCaptured."""
        reason = refusal(self._facts)
        driver = self._facts.libraries.get("driver", "")
        if reason is None and driver and numbers(driver)[:2] < OLDEST_DRIVER:
            reason = f"the driver {driver} updates no recorded tasks, 25.0 and later do"
        if reason is not None:
            raise NotCaptured(reason)
        return super().capture(program, max_rows, max_tokens, progress)

    def record(self, work: Work) -> Work:
        recorded = Recorded(self._npu.ExternalEvent())
        token = _recorded.set(recorded)
        try:
            replay = super().record(work)
        finally:
            _recorded.reset(token)

        def updated() -> Tensor:
            self._update(recorded)
            return replay()

        return updated

    def _update(self, recorded: Recorded) -> None:
        """After the replay before this one, which may still read what it was given."""
        if not recorded.tasks:
            return
        npu = self._npu
        if self._updates is None:
            self._updates = npu.Stream()
        stream = self._updates
        stream.wait_stream(npu.current_stream())
        with npu.stream(stream):
            for task in recorded.tasks:
                npu.graph_task_update_begin(stream, task.handle)
                task.call(**task.arguments())
                npu.graph_task_update_end(stream)
            recorded.event.record(stream)


def unique_slots(slots: Any, page_size: int) -> Any:
    """slots (R,) int64 in blocks of keys. Rows that are padding all write the null page's first
    slot, which the library's write leaves undefined: here each gets a slot of its own. A rehearsal,
    of nothing but padding, may have more than a page has and goes on in pages that are empty yet.
    """
    padding = slots < page_size
    places = padding.cumsum() - 1
    slots[padding] = (places + places // page_size * page_size)[padding]
    return slots


def check_room(rows: int, page_size: int, pages: int) -> None:
    """Raises KernelError where padding could reach beyond the null page (`bucket_sizes`: at most a
    quarter of the rows) or a rehearsal beyond the last page."""
    most = min(4 * page_size, pages * page_size)
    if rows > most:
        raise KernelError(f"steps of up to {most} rows are captured with such a cache, not {rows}")
