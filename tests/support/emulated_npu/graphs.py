"""`torch_npu.npu`: streams, events and graphs whose tasks are updated, as far as platforms/npu uses
them. Names and parameters are those of torch_npu's `torch_npu/npu/graphs.py` and `streams.py`.

Rules, from op-plugin's pages `torch_npu-npu-graph_task_*.md` and CANN's pages of
`aclmdlRICaptureTaskGrpBegin`, `aclmdlRICaptureTaskUpdateBegin` and the guide "task update":
what is captured is kept and not run; begin and end of a task group name one stream, which is
capturing; a task group holds single operations; an update is on a stream that is not capturing, of
as many tasks of the same kinds; it lasts only for tasks of a group. A stream that waits for an
external event which nobody records stands still: here it is an error. So is an update of a task
that a replay may still run, which the guide calls unexpected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from types import SimpleNamespace
from typing import Any

import torch
from support.graph_stand_in import Calls, NoHostReads, Tape, address, poison_results, run_again
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from .checks import NPUError, need

MODES = ("global", "thread_local", "relaxed")
UPDATABLE = frozenset({"npu_fused_infer_attention_score.out"})
"""Operations that the pages show in a task group."""
BAKED = frozenset({"npu_fused_infer_attention_score"})
"""Take numbers from the host, which a recording would keep for ever."""


class Stream:
    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def wait_stream(self, stream: Stream) -> None:
        for graph in self._runtime.replayed:
            if stream in graph.behind:
                graph.behind.add(self)


@dataclass(eq=False)
class Group:
    """Of the tasks `first` to `last` of a graph."""

    graph: NPUGraph
    first: int
    last: int = -1


class NPUGraph:
    """`behind`: streams on which all that comes next is after the last replay."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.tasks: Calls = []
        self.captured = False
        self.behind: set[Stream] = set()

    def replay(self) -> None:
        need(self.captured, "NPUGraph.replay", "nothing was captured")
        self.behind = {self._runtime.current}
        self._runtime.replayed.add(self)
        run_again(self.tasks)


@dataclass
class Update:
    stream: Stream
    group: Group
    calls: Calls = field(default_factory=list)


class Runtime:
    """The state behind one `torch_npu.npu`."""

    def __init__(self) -> None:
        self.current = Stream(self)
        self.replayed: set[NPUGraph] = set()
        self.capturing: NPUGraph | None = None
        self.group: tuple[Stream, Group] | None = None
        self.update: Update | None = None

    def namespace(self) -> SimpleNamespace:
        runtime = self

        class ExternalEvent:
            def __init__(self) -> None:
                self.recorded = False

            def record(self, stream: Stream | None = None) -> None:
                need(runtime.capturing is None, "ExternalEvent.record", "not shown in a capture")
                self.recorded = True

            def wait(self, stream: Stream | None = None) -> None:
                runtime.task("ExternalEvent.wait", stream, self._arrived)

            def reset(self, stream: Stream | None = None) -> None:
                runtime.task("ExternalEvent.reset", stream, self._forget)

            def _arrived(self) -> None:
                need(self.recorded, "ExternalEvent.wait", "nobody records it: the stream stands")

            def _forget(self) -> None:
                self.recorded = False

        return SimpleNamespace(
            ExternalEvent=ExternalEvent,
            NPUGraph=lambda: NPUGraph(self),
            Stream=lambda: Stream(self),
            current_stream=lambda: self.current,
            graph=self.graph,
            graph_pool_handle=object,
            graph_task_group_begin=self.group_begin,
            graph_task_group_end=self.group_end,
            graph_task_update_begin=self.update_begin,
            graph_task_update_end=self.update_end,
            is_current_stream_capturing=lambda: self.capturing is not None,
            stream=self.on,
        )

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(
        self,
        npu_graph: NPUGraph,
        pool: Any = None,
        stream: Stream | None = None,
        capture_error_mode: str = "global",
    ) -> Iterator[None]:
        need(capture_error_mode in MODES, "graph", f"{capture_error_mode} is none of {MODES}")
        need(not npu_graph.captured and self.capturing is None, "graph", "captured already")
        tape = Tape()
        npu_graph.tasks, self.capturing = tape.calls, npu_graph
        try:
            with self.on(stream or Stream(self)), NoHostReads(), tape:
                yield
        finally:
            self.capturing = None
        need(self.group is None, "graph", "a task group has no end")
        npu_graph.captured = True
        poison_results(npu_graph.tasks)  # nothing ran

    def task(self, op: str, stream: Stream | None, work: Callable[[], None]) -> None:
        need(self.capturing is not None, op, "only shown in a capture")
        need(stream is self.current, op, "not the stream that captures")
        if self.capturing is not None:
            self.capturing.tasks.append((work, (), {}, None))

    def group_begin(self, stream: Stream) -> None:
        op = "graph_task_group_begin"
        if self.capturing is None or stream is not self.current:
            raise NPUError(f"{op}: not a stream that captures")
        need(self.group is None, op, "inside another group")
        self.group = stream, Group(self.capturing, len(self.capturing.tasks))

    def group_end(self, stream: Stream) -> Group:
        op = "graph_task_group_end"
        if self.group is None or self.group[0] is not stream:
            raise NPUError(f"{op}: not the stream of graph_task_group_begin")
        (_, group), self.group = self.group, None
        group.last = len(group.graph.tasks)
        made = group.graph.tasks[group.first : group.last]
        names = [name_of(func) for func, *_ in made]
        need(len(names) == 1 and names[0] in UPDATABLE, op, f"tasks {names} are not shown in one")
        return group

    def update_begin(self, stream: Stream, handle: Group) -> None:
        op = "graph_task_update_begin"
        need(self.capturing is None, op, "the stream captures")
        need(self.update is None, op, "inside another update")
        need(isinstance(handle, Group) and handle.last > 0, op, "not a handle of a task group")
        need(stream is self.current, op, "operations would go to another stream")
        done = handle.graph not in self.replayed or stream in handle.graph.behind
        need(done, op, "a replay may still run the task")
        self.update = Update(stream, handle)

    def update_end(self, stream: Stream) -> None:
        op = "graph_task_update_end"
        if self.update is None or self.update.stream is not stream:
            raise NPUError(f"{op}: not the stream of graph_task_update_begin")
        update, self.update = self.update, None
        group = update.group
        kept = group.graph.tasks[group.first : group.last]
        names = [[name_of(func) for func, *_ in calls] for calls in (kept, update.calls)]
        need(names[0] == names[1], op, f"the tasks were {names[0]}, not {names[1]}")
        for place, (old, new) in enumerate(zip(kept, update.calls, strict=True), group.first):
            same = [addresses(call) for call in (old, new)]
            need(same[0] == same[1], op, "other tensors than were captured are not documented")
            group.graph.tasks[place] = (*new[:3], old[3])

    def wrapped(self, op: Callable[..., Any], name: str = "") -> Callable[..., Any]:
        """One task of a capture, whatever torch does inside."""

        @wraps(op)
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.update is not None:
                need(called in UPDATABLE, called, "not a task of a group")
                self.update.calls.append((call, args, kwargs, None))
                return kwargs.get("out")
            if self.capturing is None:
                return op(*args, **kwargs)
            need(called not in BAKED, called, "a capture keeps its lengths: use .out in a group")
            with torch._C.DisableTorchFunction(), _disable_current_modes():
                result = op(*args, **kwargs)
            self.capturing.tasks.append((call, args, kwargs, result))
            return result

        called = name or op.__name__
        call.called = called  # type: ignore[attr-defined]
        return call


def name_of(func: Any) -> str:
    return getattr(func, "called", None) or getattr(func, "__name__", str(func))


def addresses(call: Any) -> list[int]:
    return [address(leaf) for leaf in tree_leaves(call[1:3]) if isinstance(leaf, Tensor)]
