"""An Ascend NPU as a TorchDevice. Never run on one yet: what differs is only its names."""

from __future__ import annotations

import torch_npu  # type: ignore[import-not-found]  # noqa: F401 (registers the device type)

from ..torch_runtime.device import TorchDevice
from .graphs import TaskGraphs


class NPUDevice(TorchDevice):
    @property
    def graphs(self) -> TaskGraphs:
        return TaskGraphs(self)

    @property
    def collectives(self) -> str:
        return "hccl"

    @property
    def collectives_advice(self) -> str:
        return "ASCEND_SLOG_PRINT_TO_STDOUT=1 ASCEND_GLOBAL_LOG_LEVEL=1 name what it does."
