"""Conformance cases on any TorchDevice: numpy cases to tensors between sentinels, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...common.errors import ConformanceError
from ...common.ops.conformance import as_list, is_float
from ...common.ops.paging import to_int8_rows
from ...common.ops.registry import KernelRegistry
from ...common.ops.suite import group_of, is_stored, problem_of, spec_of, step_of, suite_of
from ..interface_kernels import Case, Kernel, KernelTable, Op, Suite
from .device import TorchDevice
from .dtypes import DTYPES
from .kernels import kv_write, page_copy, register_generic
from .pools import TorchKVPool

PAD = 64
"""Elements of sentinel before and behind every float argument."""
SENTINEL = 1234.5
OTHER_LAYER = 7
"""What the layer that is not under test holds, to be found again."""
LAYERS, LAYER = 2, 1


@dataclass(frozen=True, slots=True)
class _Block:
    """A float argument inside a larger tensor of sentinels."""

    name: str
    whole: Tensor
    inside: Tensor
    before: Tensor


class TorchRunner:
    """The CaseRunner of every torch platform."""

    def __init__(self, device: TorchDevice) -> None:
        self.device = device

    def run_kernel(self, op: Op, kernel: Kernel, case: Case, dtype: str) -> Sequence[NDArray[Any]]:
        given = dict(case.args)
        prepared = {}
        if op.weights and kernel.prepare is not None:
            problem = problem_of(op, case, dtype)
            stored = [name for name, value in given.items() if is_stored(value)]
            prepared = {name: kernel.prepare(given.pop(name), problem) for name in stored}
        args, blocks = self._arguments(op, given, dtype)
        with torch.inference_mode():
            results = as_list(kernel.fn(**args, **prepared))
        self._check(op, blocks, results)
        return [to_numpy(result) for result in results]

    def _arguments(
        self, op: Op, given: Mapping[str, Any], dtype: str
    ) -> tuple[dict[str, Any], list[_Block]]:
        args: dict[str, Any] = {}
        blocks = []
        for name, value in given.items():
            if is_float(value):
                kind = torch.float32 if name in op.float32 else DTYPES[dtype]
                block = self._enclosed(name, value, kind)
                blocks.append(block)
                args[name] = block.inside
            else:
                args[name] = self._plain(value) if isinstance(value, np.ndarray) else value
        return args, blocks

    def _enclosed(self, name: str, value: NDArray[Any], dtype: torch.dtype) -> _Block:
        where = self.device.torch_device
        whole = torch.full((value.size + 2 * PAD,), SENTINEL, dtype=dtype, device=where)
        inside = whole[PAD : PAD + value.size].view(value.shape)
        inside.copy_(self.device.to_device(value.astype(np.float32)))
        return _Block(name, whole, inside, inside.clone())

    def _plain(self, value: NDArray[Any]) -> Tensor:
        """torch has little of uint32, so masks go as the int32 of the same bits. Strides stay."""
        own = value.copy(order="K")
        host = torch.from_numpy(own.view(np.int32) if own.dtype == np.uint32 else own)
        return host.to(self.device.torch_device)

    def _check(self, op: Op, blocks: Sequence[_Block], results: Sequence[Tensor]) -> None:
        for block in blocks:
            edges = torch.cat((block.whole[:PAD], block.whole[len(block.whole) - PAD :]))
            sentinel = torch.tensor(SENTINEL, device=edges.device).to(edges.dtype)
            if not bool((edges == sentinel).all()):
                raise ConformanceError(f"wrote outside {block.name!r}")
            if block.name in op.in_place:
                if not any(r.data_ptr() == block.inside.data_ptr() for r in results):
                    raise ConformanceError(f"{block.name!r} is to be changed in place")
            elif not torch.equal(block.before.nan_to_num(), block.inside.nan_to_num()):
                raise ConformanceError(f"changed its input {block.name!r}")

    def run_attention(
        self, backend: Any, case: Case, dtype: str, kv_dtype: str = ""
    ) -> Sequence[NDArray[Any]]:
        result, pool = self.attend(backend, case, dtype, kv_dtype)
        if not bool((pool.data[1 - LAYER] == OTHER_LAYER).all()):
            raise ConformanceError("another layer was touched")
        return [to_numpy(result)]

    def attend(
        self, backend: Any, case: Case, dtype: str, kv_dtype: str = ""
    ) -> tuple[Tensor, TorchKVPool]:
        """(T, heads, dim), and the pool afterwards, whose layer LAYER is the one under test."""
        group, spec = group_of(case), spec_of(case, dtype, kv_dtype)
        pool = TorchKVPool(group, backend.layout(group, spec, LAYERS), self.device, _POOL_OPS)
        self.fill(pool, case.args["keys"], case.args["values"])
        q, k, v = (self.device.to_device(case.args[name]).to(DTYPES[dtype]) for name in "qkv")
        sinks = case.args["sinks"]
        sinks = None if sinks is None else self.device.to_device(sinks)
        with torch.inference_mode():
            bound = backend.bind(backend.plan(step_of(case), group))
            return backend.run(bound, pool, LAYER, q, k, v, spec, sinks), pool

    def fill(self, pool: TorchKVPool, keys: NDArray[Any], values: NDArray[Any]) -> None:
        """The layer under test by slots as given, the other one a value to be found again."""
        pool.data.fill_(OTHER_LAYER)
        slots = torch.arange(len(keys), device=self.device.torch_device)
        pool.write(LAYER, slots, *(self._kept(x, pool.data.dtype) for x in (keys, values)))

    def _kept(self, x: NDArray[Any], dtype: torch.dtype) -> Tensor:
        if dtype == torch.int8:
            return self.device.to_device(to_int8_rows(x))
        return self.device.to_device(x).to(dtype)


_POOL_OPS = KernelTable(
    {
        fn.__name__: Kernel(fn.__name__, "generic", lambda facts, problem: None, fn)
        for fn in (kv_write, page_copy)
    },
    (),
)


def to_numpy(result: Tensor) -> NDArray[Any]:
    """On the host; floats as float32."""
    host = result.detach().cpu()
    return np.asarray((host.float() if host.is_floating_point() else host).numpy())


def device_suite(
    device: TorchDevice, register: Callable[[KernelRegistry], None] | None = None
) -> Suite:
    """The suite of a device that is there. `register` adds a platform's kernels to the generic
    ones."""
    device.attach()
    registry = KernelRegistry()
    register_generic(registry, device)
    if register is not None:
        register(registry)
    return suite_of(registry, device.facts, TorchRunner(device), "device")
