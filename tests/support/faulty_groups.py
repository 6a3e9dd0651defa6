"""CPU devices that are joined, and groups with one faulty rank: for processes to import."""

from __future__ import annotations

import os
import threading
from functools import partial

from torch import Tensor

from sixfold.common.errors import PlatformError
from sixfold.platforms.cpu.device import CpuDevice
from sixfold.platforms.interface import DeviceFacts
from sixfold.platforms.torch_runtime.collectives import Collectives
from sixfold.platforms.torch_runtime.device import TorchDevice

BAD = 1
"""The faulty rank."""
DTYPES = ("float32", "bfloat16", "float16", "int8")


def cpu(dtypes: tuple[str, ...] = ("float32",)) -> CpuDevice:
    kinds = frozenset(dtypes)
    return CpuDevice(
        DeviceFacts("cpu", "a CPU", (), 0, True, 1, kinds, "none", "none", {}, cores=1)
    )


def openers(count: int, *dtypes: str) -> list[partial[CpuDevice]]:
    return [partial(cpu, dtypes or ("float32",))] * count


def no_device() -> TorchDevice:
    raise PlatformError("no such device")


class OfNccl(CpuDevice):
    """Asks for a backend that torch's CPU build lacks."""

    @property
    def collectives(self) -> str:
        return "nccl"


def of_nccl() -> TorchDevice:
    return OfNccl(cpu().facts)


class Adding(Collectives):
    def all_reduce(self, tensor: Tensor) -> Tensor:
        wrong = self.seat.rank == BAD and len(tensor) == 1001
        return super().all_reduce(tensor) + int(wrong)


class Hanging(Collectives):
    def all_gather(self, tensor: Tensor) -> Tensor:
        if self.seat.rank == BAD:
            threading.Event().wait()
        return super().all_gather(tensor)


class Dying(Collectives):
    def broadcast(self, tensor: Tensor, root: int) -> Tensor:
        if self.seat.rank == BAD:
            os._exit(3)
        return super().broadcast(tensor, root)


class Lingering(Collectives):
    """Leaves the group and does not end."""

    def close(self) -> None:
        super().close()
        if self.seat.rank == BAD:
            threading.Thread(target=threading.Event().wait).start()


class Lazy(Collectives):
    """Leaves out every sum, on every rank."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor.clone()
