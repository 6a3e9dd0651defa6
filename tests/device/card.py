"""The device under test, and what every stage needs of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from support.random_source import RandomSource
from torch import Tensor

from sixfold.common.errors import PlatformError
from sixfold.common.ops.registry import KernelRegistry
from sixfold.platforms import select
from sixfold.platforms.interface import DeviceFacts, EngineSpec, ExecutorInfo
from sixfold.platforms.machine import observe
from sixfold.platforms.torch_runtime.device import TorchDevice
from sixfold.platforms.torch_runtime.executor import TorchExecutor
from sixfold.platforms.torch_runtime.kernels import register_generic
from sixfold.platforms.torch_runtime.stream_graphs import StreamGraphs


class NoCard(Exception):
    """There is no such device here; the text says what lacks."""


@dataclass(frozen=True)
class Sizes:
    """How large the stages are: `FULL` for a card, `SMALL` to try the stages themselves."""

    model: dict[str, Any]
    rows: tuple[int, ...]
    context: int
    steps: int
    contexts: tuple[int, ...]
    copy_bytes: int
    square: int
    linear: tuple[int, int]
    linear_rows: tuple[int, ...]
    seconds: float  # of each timing


@dataclass(frozen=True)
class Card:
    platform: str
    facts: DeviceFacts
    sizes: Sizes

    def executor(self, config: dict[str, Any], **fields: Any) -> tuple[TorchExecutor, ExecutorInfo]:
        """Of random weights, loaded."""
        spec = EngineSpec("", **fields)
        executor = select.platforms()[self.platform].executor(spec, self.facts)
        if not isinstance(executor, TorchExecutor):
            raise NoCard(f"the platform {self.platform} does not run torch models")
        executor._open = lambda _: RandomSource(config)
        return executor, executor.load()

    def device(self) -> tuple[TorchDevice, KernelRegistry]:
        """For this thread, with all kernels that the platform registers."""
        made = select.platforms()[self.platform].executor(EngineSpec(""), self.facts)
        if not isinstance(made, TorchExecutor):
            raise NoCard(f"the platform {self.platform} does not run torch models")
        device, register = made._device, made._register
        made.close()
        device.attach()
        registry = KernelRegistry()
        register_generic(registry, device)
        if register is not None:
            register(registry)
        return device, registry

    @property
    def dtype(self) -> str:
        return "bfloat16" if "bfloat16" in self.facts.dtypes else "float32"


def open_card(platform: str, sizes: Sizes) -> Card:
    """Raises NoCard with the reason and the remedy."""
    found = select.probe_all(observe())
    try:
        select.choose(found, platform)
    except PlatformError as error:
        raise NoCard(str(error)) from None
    return Card(platform, found[platform].devices[0], sizes)


def seconds_of(device: TorchDevice, work: Callable[[], Tensor], budget: float) -> tuple[float, str]:
    """Median of one run of `work` on the device, replayed from a graph where that can be had, so
    that launches do not count; and how it was run."""
    how = "op by op"
    graphs = device.graphs
    if isinstance(graphs, StreamGraphs):
        try:
            work, how = graphs.record(work), "replayed"
        except RuntimeError as error:
            how = f"op by op ({str(error).splitlines()[0][:100]})"
    work()
    device.synchronize()
    runs, times = 1, []
    ends = time.perf_counter() + budget
    while len(times) < 5 or time.perf_counter() < ends:
        began = time.perf_counter()
        for _ in range(runs):
            work()
        device.synchronize()
        took = time.perf_counter() - began
        times.append(took / runs)
        if took < budget / 20:
            runs, times = min(2 * runs, 4096), []
    return sorted(times)[len(times) // 2], how
