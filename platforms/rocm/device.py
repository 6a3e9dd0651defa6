"""An AMD GPU as a TorchDevice. Never run on one yet."""

from __future__ import annotations

import torch

from ..torch_runtime.device import TorchDevice
from ..torch_runtime.stream_graphs import StreamGraphs


class ROCmDevice(TorchDevice):
    @property
    def graphs(self) -> StreamGraphs:
        # torch's ROCm build records HIP graphs under CUDA's name.
        mode = "thread_local"
        device = self.torch_device
        return StreamGraphs(device, torch.cuda, "CUDAGraph", capture_error_mode=mode)

    @property
    def collectives(self) -> str:
        return "nccl"  # torch's ROCm build has RCCL under this name

    @property
    def collectives_advice(self) -> str:
        return "NCCL_DEBUG=INFO names what RCCL does; NCCL_P2P_DISABLE=1 leaves out direct copies."
