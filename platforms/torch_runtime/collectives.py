"""Process groups over a device's backend (torch.distributed): one process per device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ...common.errors import PlatformError
from .device import TorchDevice


@dataclass(frozen=True, slots=True)
class Seat:
    """A process's place in a group."""

    rank: int  # 0 <= rank < world
    world: int
    store: str  # path of a file, at first absent or empty, that all of the group can write
    limit_s: float  # seconds that the joining, and each collective, may take


class Collectives:
    """The process's only group. Every member calls the same collectives in the same order, with
    tensors of one shape and dtype on its device. Results are new tensors and finished: the host
    waits, at most `limit_s`. After an error the group is of no more use.
    """

    def __init__(self, device: TorchDevice, seat: Seat) -> None:
        """Blocks until all have joined. Raises PlatformError, as every collective does."""
        self.device, self.seat = device, seat
        self._limit = timedelta(seconds=seat.limit_s)
        self._require_backend()
        try:
            dist.init_process_group(
                device.collectives,
                store=dist.FileStore(seat.store, seat.world),  # type: ignore[attr-defined]
                rank=seat.rank,
                world_size=seat.world,
                timeout=self._limit,
            )
        except (RuntimeError, ValueError) as error:
            raise self._failed("joining", error) from error

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, on every rank."""
        result = tensor.clone()
        self._run("all_reduce", lambda: dist.all_reduce(result, async_op=True))
        return result

    def all_gather(self, tensor: Tensor) -> Tensor:
        """(world, *shape): the tensors of all ranks in their order, on every rank."""
        result = self.device.empty((self.seat.world, *tensor.shape), tensor.dtype)
        pieces = list(result.unbind(0))
        self._run("all_gather", lambda: dist.all_gather(pieces, tensor, async_op=True))
        return result

    def broadcast(self, tensor: Tensor, root: int) -> Tensor:
        """The tensor of rank `root`, on every rank."""
        result = tensor.clone()
        self._run("broadcast", lambda: dist.broadcast(result, root, async_op=True))
        return result

    def close(self) -> None:
        """Leave the group; for a group without an error."""
        dist.destroy_process_group()

    def _require_backend(self) -> None:
        wanted = self.device.collectives
        if not dist.is_available():
            raise PlatformError(f"{wanted}: this build of torch has no torch.distributed.")
        if not dist.is_backend_available(wanted):
            there = [name for name in dist.Backend.backend_list if dist.is_backend_available(name)]
            raise PlatformError(
                f"{wanted}: this build of torch lacks it; it has {', '.join(there) or 'none'}. "
                f"Install the torch that `sixfold doctor` names for {self.device.facts.kind}."
            )

    def _run(self, what: str, start: Callable[[], Any]) -> None:
        """A wait with a limit of its own blocks the host also where a queue would not."""
        try:
            start().wait(self._limit)
        except RuntimeError as error:
            raise self._failed(what, error) from error
        self.device.synchronize()

    def _failed(self, what: str, error: Exception) -> PlatformError:
        seat = self.seat
        said = str(error).strip().splitlines() or [type(error).__name__]
        return PlatformError(
            f"{self.device.collectives}, rank {seat.rank} of {seat.world} on "
            f"{self.device.torch_device}: {what} (limit {seat.limit_s:g} s): {said[0][:300]}. "
            f"Next: {self.device.collectives_advice}"
        )
