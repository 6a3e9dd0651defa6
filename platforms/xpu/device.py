"""An Intel GPU as a TorchDevice. Never run on one yet: what differs is its names, and that the
driver of an integrated GPU may not tell how much memory is free."""

from __future__ import annotations

import psutil
import torch

from ...common.errors import PlatformError
from ..interface import Decision, Status, Support
from ..torch_runtime.device import TorchDevice
from ..torch_runtime.graph_runner import Work
from ..torch_runtime.step_program import NotCaptured
from ..torch_runtime.stream_graphs import StreamGraphs


class XPUGraphs(StreamGraphs):
    def record(self, work: Work) -> Work:
        """Raises NotCaptured: whether a driver can record shows only when it is asked to."""
        try:
            return super().record(work)
        except RuntimeError as error:
            raise NotCaptured(f"this GPU's driver records no {self._kind}: {error}") from error


class XPUDevice(TorchDevice):
    checks_attention = True

    @property
    def graphs(self) -> XPUGraphs | None:
        if self.facts.graphs == "none":
            return None
        return XPUGraphs(self.torch_device, torch.xpu, "XPUGraph")

    @property
    def collectives(self) -> str:
        return "xccl"

    @property
    def collectives_advice(self) -> str:
        return "CCL_LOG_LEVEL=info names what it does."

    def memory_query(self) -> Support:
        """Whether the driver tells free memory, and if not what it says."""
        try:
            super().memory()
        except RuntimeError as error:
            return Support(Status.NO, f"its driver does not tell free memory: {error}")
        return Support(Status.YES)

    def memory(self) -> tuple[int, int]:
        """Where the driver does not tell: the host's, for a GPU that has no other. Raises
        PlatformError for one with memory of its own."""
        answer = self.memory_query()
        if answer.status is Status.YES:
            return super().memory()
        if not self.facts.unified_memory:
            raise PlatformError(f"{self.facts.name}: {answer.reason}.")
        host = psutil.virtual_memory()
        return int(host.available), int(host.total)

    def decisions(self) -> tuple[Decision, ...]:
        answer = self.memory_query()
        if answer.status is Status.YES:
            return super().decisions()
        told = Decision("memory", "the host's", answer.reason, fallback=True)
        return (*super().decisions(), told)
