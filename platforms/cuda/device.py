"""An NVIDIA GPU as a TorchDevice. Never run on one yet."""

from __future__ import annotations

import torch

from ..torch_runtime.device import TorchDevice
from ..torch_runtime.stream_graphs import StreamGraphs


class CUDADevice(TorchDevice):
    @property
    def graphs(self) -> StreamGraphs:
        # Other threads of the process may use the device while this one records.
        mode = "thread_local"
        device = self.torch_device
        return StreamGraphs(device, torch.cuda, "CUDAGraph", capture_error_mode=mode)

    @property
    def collectives(self) -> str:
        return "nccl"

    @property
    def collectives_advice(self) -> str:
        return "NCCL_DEBUG=INFO names what it does; NCCL_P2P_DISABLE=1 leaves out direct copies."
