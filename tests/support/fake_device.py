"""A whole model on a device that is not there: torch's fake tensors on the CPU build, which have
shapes, dtypes and a device but no values.

What a step does wrong on a device shows: tensors of two devices in one operation, a read of a value
on the host inside the model's forward, a size that depends on values. Two things that the CPU build
cannot do for another device's fake tensors are done here instead: Python indexing, and moving a
tensor to the device. A library's kernels are replaced while tracing (`Opaque`), for they are opaque
to torch; Triton's wrappers are the real ones, whose launches a test records (`recorded_launches`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from support.graph_stand_in import READS, Recording, tensors_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from sixfold.platforms.interface import EngineSpec, ExecutorInfo
from sixfold.platforms.interface_attention import AttentionBackend
from sixfold.platforms.interface_kernels import Kernel
from sixfold.platforms.interface_step import StepBatch, StepResult
from sixfold.platforms.torch_runtime.device import TorchDevice
from sixfold.platforms.torch_runtime.executor import TorchExecutor
from sixfold.platforms.torch_runtime.kernels import GENERIC
from sixfold.platforms.torch_runtime.model_source import ModelSource
from sixfold.platforms.torch_runtime.step_program import StepProgram

FREE = 64 << 30
NO_ATTENTION = ("xpu", "privateuseone")


class HostRead(RuntimeError):
    """The model's forward reads a device value on the host."""


class _Api(TorchFunctionMode):
    """`forward` True: inside the model's forward, where nothing may come to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self.forward and name in READS:
            raise HostRead(f"the model's forward reads a device value on the host: Tensor.{name}")
        if name == "__getitem__":
            return index(args[0], args[1])
        if name == "__setitem__":
            return assign(*args)
        if name == "nonzero":
            return torch.ops.aten.nonzero.default(args[0])
        if name == "contiguous":
            return torch.ops.aten.clone.default(args[0], memory_format=torch.contiguous_format)
        if name == "__invert__":
            return torch.ops.aten.bitwise_not.default(args[0])
        if name == "copy_":
            return torch.ops.aten.copy_.default(*args, **kwargs)
        if name == "index_copy_":
            return torch.ops.aten.index_copy_.default(*args, **kwargs)
        if name == "scaled_dot_product_attention" and args[0].device.type in NO_ATTENTION:
            # The CPU build has no choice of kernels for it; products of the shapes say the rest.
            return args[0] @ args[1].mT @ args[2]
        if name == "to":
            return self._to(args[0], args[1:], kwargs)
        return func(*args, **kwargs)

    def _to(self, tensor: Tensor, args: Any, kwargs: dict[str, Any]) -> Tensor:
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        device, dtype = device or tensor.device, dtype or tensor.dtype
        if self.forward and device != tensor.device:
            raise HostRead(f"the model's forward moves a tensor from {tensor.device} to {device}")
        if device == tensor.device and dtype == tensor.dtype:
            return tensor
        return torch.empty(tensor.shape, device=device, dtype=dtype)


def index(tensor: Tensor, key: Any) -> Tensor:
    """`tensor[key]` by operations: the CPU build's own indexing asks for the device's runtime."""
    at, picked = 0, []
    for part in _parts(tensor, key):
        if part is None:
            tensor = tensor.unsqueeze(at)
        elif isinstance(part, slice):
            tensor = torch.ops.aten.slice(tensor, at, part.start, part.stop, part.step or 1)
        elif isinstance(part, Tensor):
            picked += [None] * (at - len(picked)) + [part]
        else:
            tensor = tensor.select(at, int(part))
            continue
        at += 1
    return torch.ops.aten.index(tensor, picked) if picked else tensor


def assign(tensor: Tensor, key: Any, value: Any) -> None:
    parts = _parts(tensor, key)
    if any(isinstance(part, Tensor) for part in parts):
        places = [part if isinstance(part, Tensor) else None for part in parts]
        if any(part not in (slice(None), None) for part in parts if not isinstance(part, Tensor)):
            raise NotImplementedError("tracing writes by tensors or by slices, not by both")
        torch.ops.aten.index_put_(tensor, places, value)
    elif isinstance(value, Tensor):
        torch.ops.aten.copy_.default(index(tensor, key), value)
    else:
        index(tensor, key).fill_(value)


def _parts(tensor: Tensor, key: Any) -> list[Any]:
    parts = list(key) if isinstance(key, tuple) else [key]
    if any(part is Ellipsis for part in parts):
        at = next(i for i, part in enumerate(parts) if part is Ellipsis)
        named = sum(part is not None for part in parts) - 1
        parts[at : at + 1] = [slice(None)] * (tensor.dim() - named)
    return parts


class _Attention:
    """A backend whose `run` is opaque: its plans are made and bound, its result is a shape."""

    def __init__(self, backend: AttentionBackend) -> None:
        self._backend = backend
        self.runs = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def run(
        self, bound: Any, pool: Any, layer: int, q: Tensor, k: Tensor, v: Tensor, spec: Any,
        sinks: Any = None,
    ) -> Tensor:  # fmt: skip
        self.runs += 1
        for tensor in (k, v, pool.data, *tensors_of(bound), *tensors_of(sinks)):
            if tensor.device != q.device:
                raise RuntimeError(f"attention gets a tensor on {tensor.device}, not {q.device}")
        return torch.empty_like(q)


class Opaque:
    """A registry as a platform's `register` sees it: kernels of opaque providers compute as the
    generic ones while their selection stays their own."""

    def __init__(self, registry: Any, providers: frozenset[str]) -> None:
        self._registry = registry
        self._providers = providers

    def add(self, kernel: Kernel) -> None:
        if kernel.provider in self._providers:
            kernel = replace(kernel, fn=GENERIC[kernel.op], prepare=None)
        self._registry.add(kernel)

    def add_attention(self, backend: AttentionBackend, priority: int = 0) -> None:
        opaque = backend.name in self._providers
        self._registry.add_attention(_Attention(backend) if opaque else backend, priority)


class FakeExecutor:
    """An executor of a real platform's device and kernels, on fake tensors and in this thread."""

    def __init__(
        self,
        device: TorchDevice,
        register: Callable[[Any], None],
        source: ModelSource,
        spec: EngineSpec,
        graphs: Any = None,
    ) -> None:
        self.api = _Api()
        self._mode = FakeTensorMode()
        self._graphs = graphs
        self._executor = TorchExecutor(spec, absent(device, graphs), register, lambda _: source)
        with self._fake():
            self.info: ExecutorInfo = self._executor._load(None)
        runner = self._executor._runner
        if runner is None:
            raise RuntimeError("the executor has no runner")
        self._runner = runner
        self._watch(runner._program)

    def run(self, batch: StepBatch) -> StepResult:
        with self._fake():
            return self._runner.run(batch)

    def record(self) -> int:
        """The decode steps of all buckets, by the rules of a device graph. How many there are."""
        for bucket in self.buckets:
            with self._fake():
                Recording(bucket.work)
                for draw in bucket.draw.works.values():
                    Recording(draw)
        return len(self.buckets)

    @property
    def buckets(self) -> list[Any]:
        return self._graphs.runner.buckets if self._graphs.runner else []

    @property
    def model(self) -> Any:
        return self._runner._model

    @property
    def program(self) -> StepProgram:
        return self._runner._program

    def _watch(self, program: StepProgram) -> None:
        forward = program.forward

        def watched(*args: Any) -> Tensor:
            self.api.forward = True
            try:
                return forward(*args)
            finally:
                self.api.forward = False

        program.forward = watched  # type: ignore[method-assign]

    @contextmanager
    def _fake(self) -> Iterator[None]:
        with self._mode, self.api:
            yield


def absent(device: TorchDevice, graphs: Any) -> TorchDevice:
    """The device with what needs its runtime replaced."""

    class Absent(type(device)):  # type: ignore[misc]
        def attach(self) -> None:
            return

        def memory(self) -> tuple[int, int]:
            return FREE, FREE

        def to_host(self, tensor: Tensor) -> Any:
            return np.zeros(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))

        @property
        def graphs(self) -> Any:
            return graphs

    return Absent(device.facts, str(device.torch_device))
