"""Graphs by recording a stream: what torch has for NVIDIA's and AMD's GPUs (`torch.cuda.CUDAGraph`)
and, in the same words, for Intel's (`torch.xpu.XPUGraph`). Never run on a device yet."""

from __future__ import annotations

from typing import Any

import torch

from ..interface import Decision, LoadProgress
from .graph_runner import GraphRunner, Work, capture_by_rows
from .step_program import StepProgram

REHEARSALS = 2
"""Runs before a recording: kernels are compiled and libraries start in the first, which a recording
cannot hold; the second shows that nothing is left to be made."""


class StreamGraphs:
    """`library` is torch's module of the device, its `graph` records a stream; `kind` is the name
    of its graph class. All recordings of one object share one pool of memory."""

    def __init__(self, device: torch.device, library: Any, kind: str, **options: Any) -> None:
        """`options` are passed on to `library.graph`."""
        self._device = device
        self._library = library
        self._kind = kind
        self._options = options
        self._pool: Any = None

    def capture(
        self,
        program: StepProgram,
        max_rows: int,
        max_tokens: int,
        progress: LoadProgress | None,
    ) -> tuple[GraphRunner, Decision]:
        """Raises NotCaptured."""
        return capture_by_rows(program, self.record, max_rows, self._device, self._kind, progress)

    def record(self, work: Work) -> Work:
        for _ in range(REHEARSALS):
            work()
        if self._pool is None:
            self._pool = self._library.graph_pool_handle()
        graph = getattr(self._library, self._kind)()
        with self._library.graph(graph, pool=self._pool, **self._options):
            result = work()

        def replay() -> torch.Tensor:
            graph.replay()
            return result

        return replay
