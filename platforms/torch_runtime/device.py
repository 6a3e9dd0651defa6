"""The Device interface over torch's device-neutral API. A platform overrides what differs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..interface import Decision, DeviceFacts, Event, LoadProgress, Status, Support

if TYPE_CHECKING:
    from .step_program import StepProgram, StepRunner


class Graphs(Protocol):
    """How a device runs a step with less host work. Two forms there are: a recording that serves
    steps of every size (the CPU's), and one per number of rows (`graph_runner`)."""

    def capture(
        self,
        program: StepProgram,
        max_rows: int,
        max_tokens: int,
        progress: LoadProgress | None,
    ) -> tuple[StepRunner, Decision]:
        """A runner that gives what `program.run` gives; `progress` counts captured steps. Raises
        NotCaptured with the reason."""
        ...


class TorchEvent:
    """An event recorded at the end of the device's queue when it was made."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.Event(device)
        self._event.record()

    def wait(self) -> None:
        """Block the host until the device has reached the event."""
        self._event.synchronize()


class TorchDevice:
    """One torch device. Nothing is initialised before `attach`.

    `feature_support` is how far the sampler's features were seen to work on this kind of device.
    """

    feature_support = Support(Status.UNVERIFIED, "torch code, not yet run on this kind of device")
    checks_attention = False
    """Whether a backend must give right numbers at load before it serves."""

    def __init__(self, facts: DeviceFacts, torch_device: str) -> None:
        self._facts = facts
        self.torch_device = torch.device(torch_device)

    @property
    def facts(self) -> DeviceFacts:
        return self._facts

    @property
    def sums(self) -> torch.dtype:
        """The dtype of the sampler's sums over a vocabulary."""
        return torch.float64 if self._facts.float64 else torch.float32

    def prepare(self) -> None:
        """Settings of the whole process, made before the thread of `attach` is started. Most
        devices have none; the CPU's are in `platforms/cpu`."""

    def attach(self) -> None:
        """Prepare the calling thread; it is the one that loads and runs everything."""
        torch.accelerator.set_device_index(self.torch_device.index or 0)

    def decisions(self) -> tuple[Decision, ...]:
        """What the device itself decided, beyond what every executor decides."""
        return ()

    def default_dtype(self, checkpoint_dtype: str) -> tuple[str, str]:
        """The dtype when the user names none, and why. `checkpoint_dtype` may be ""."""
        if checkpoint_dtype in self._facts.dtypes:
            return checkpoint_dtype, "the checkpoint's own dtype, native to this device"
        for name in ("bfloat16", "float16"):
            if name in self._facts.dtypes:
                return name, "the 16-bit dtype native to this device"
        return "float32", "this device has no native 16-bit dtype"

    def default_kv_dtype(self, dtype: str, quantised: bool) -> tuple[str, str]:
        """The dtype of keys and values when the user names none, and why. `quantised`: weights
        are kept in fewer bits than a float has."""
        return dtype, "the dtype of the activations"

    def memory(self) -> tuple[int, int]:
        free, total = torch.accelerator.get_memory_info(self.torch_device.index or 0)
        return int(free), int(total)

    def cache_budget(self, free: int, weights: int) -> tuple[int, str]:
        """Bytes for the cache when the user sets no limit, and why. `free` is before loading."""
        return int(free * 0.9) - weights, "90 % of the free device memory, less the weights"

    def synchronize(self) -> None:
        torch.accelerator.synchronize(self.torch_device.index or 0)

    def event(self) -> Event:
        return TorchEvent(self.torch_device)

    def to_device(self, array: Any) -> Tensor:
        """A numpy array or a host tensor -> a tensor on the device. On a device that shares the
        host's memory the tensor may share the array's, which then must not change while in use."""
        host = array if isinstance(array, Tensor) else torch.from_numpy(_writable(array))
        return host.to(self.torch_device, non_blocking=True)

    def to_host(self, tensor: Tensor) -> Any:
        """A numpy array; waits for the tensor. On the host's own memory, a view."""
        return tensor.detach().cpu().numpy()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.torch_device)

    @property
    def graphs(self) -> Graphs | None:
        """How this device captures a step, or None."""
        return None

    @property
    def collectives(self) -> str:
        raise NotImplementedError(f"{self._facts.kind}: no process group backend is declared.")

    @property
    def collectives_advice(self) -> str:
        """What to try when they fail: the variable that makes their library speak."""
        raise NotImplementedError(f"{self._facts.kind}: no process group backend is declared.")


def _writable(array: Any) -> Any:
    """torch.from_numpy warns about read-only memory; such arrays are small and rare: copy them."""
    array = np.ascontiguousarray(array)
    return array if array.flags.writeable else array.copy()
