"""An NVIDIA GPU as a TorchDevice. Never run on one yet: what differs is only its names."""

from __future__ import annotations

from ..torch_runtime.device import TorchDevice


class CUDADevice(TorchDevice):
    @property
    def collectives(self) -> str:
        return "nccl"
