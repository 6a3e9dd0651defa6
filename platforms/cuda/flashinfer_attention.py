"""FlashInfer as an attention backend. Written against flashinfer-python 0.7.2.post1
(`flashinfer/decode.py`, `flashinfer/prefill.py`); not yet run on a device.

Steps that only decode take a BatchDecodeWithPagedKVCacheWrapper, all others a
BatchPrefillWithPagedKVCacheWrapper. A wrapper's `plan` is host work that ends in copies to the
device: it is our `bind`. A captured bucket has a decode wrapper of its own, whose batch size is
fixed and whose buffers stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...common.errors import KernelError
from ..interface import DeviceFacts
from ..interface_attention import AttentionSpec
from ..interface_kv import KVGroup, KVLayout
from ..interface_step import StepBatch
from ..judgement import numbers
from ..torch_runtime.device import TorchDevice
from ..torch_runtime.dtypes import DTYPES
from ..torch_runtime.paged_rows import PagedRows, plan_rows, table_width
from ..torch_runtime.pools import TorchKVPool

PACKAGE = "flashinfer-python"
VERSIONS = (0, 7), (0, 8)
"""From the first, below the second: the signatures that this adapter was written against."""
HEAD_DIMS = (64, 128, 256)
"""Head sizes that the library compiles its FA2 kernels for."""
OLDEST_ARCH = (8, 0)
WORKSPACE = 128 << 20
"""Bytes; the size that the library recommends."""


@dataclass(slots=True)
class Bound:
    """A wrapper that has been planned for a step, and where the step's keys and values go."""

    wrapper: Any
    slots: Tensor  # (T,) int64


class FlashInferAttention:
    """AttentionBackend. The library is imported at the first `bind` or `reserve`: it takes seconds,
    and compiles its kernels when they are first planned."""

    name = "flashinfer"

    def __init__(self, device: TorchDevice) -> None:
        self._device = device
        self._specs: dict[str, AttentionSpec] = {}
        self._wrappers: dict[tuple[str, bool], Any] = {}
        self._workspace: Tensor | None = None

    def accepts(self, spec: AttentionSpec, facts: DeviceFacts) -> tuple[str, ...]:
        return refusals(spec, facts)

    def layout(self, group: KVGroup, spec: AttentionSpec, layers: int) -> KVLayout:
        """Tokens before kv: the library takes keys and values apart, of any equal strides."""
        self._specs[group.name] = spec
        axes = ("layer", "page", "token", "kv", "head", "dim")
        shape = (layers, group.pages, group.page_size, 2, spec.kv_heads, spec.head_dim)
        return KVLayout(axes, shape, spec.dtype)

    def plan(self, batch: StepBatch, group: KVGroup) -> PagedRows:
        return plan_rows(batch, group)

    def reserve(self, group: KVGroup, rows: int, tokens: int, longest: int) -> Bound:
        """Raises KernelError for shapes other than one token a row."""
        if tokens != rows:
            raise KernelError("attention kernel flashinfer is captured for steps that decode only")
        empty = self._device.empty
        wrapper = self._library().BatchDecodeWithPagedKVCacheWrapper(
            self._space(),
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=True,
            paged_kv_indptr_buffer=empty((rows + 1,), torch.int32),
            paged_kv_indices_buffer=empty((rows * table_width(group, longest),), torch.int32),
            paged_kv_last_page_len_buffer=empty((rows,), torch.int32),
            backend="fa2",
        )
        return Bound(wrapper, empty((rows,), torch.int64))

    def bind(self, plan: PagedRows, reserved: Bound | None = None) -> Bound:
        spec = self._specs[plan.group.name]
        if reserved is None:
            wrapper = self._wrapper(plan)
            self._plan(wrapper, plan, spec)
            return Bound(wrapper, self._device.to_device(plan.slots.astype(np.int64)))
        plan = plan.padded(len(reserved.slots))
        self._plan(reserved.wrapper, plan, spec)
        reserved.slots.copy_(torch.from_numpy(plan.slots.astype(np.int64)))
        return reserved

    def run(
        self,
        bound: Bound,
        pool: TorchKVPool,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        spec: AttentionSpec,
        sinks: Tensor | None = None,
    ) -> Tensor:
        pool.write(layer, bound.slots, k, v)
        result: Tensor = bound.wrapper.run(q, pool.tokens[layer].unbind(2))
        return result

    def _plan(self, wrapper: Any, plan: PagedRows, spec: AttentionSpec) -> None:
        start, pages, last = (torch.from_numpy(part) for part in plan.page_list())
        sizes = (spec.heads, spec.kv_heads, spec.head_dim, plan.group.page_size)
        options: dict[str, Any] = {
            "sm_scale": spec.scale,
            "window_left": spec.window - 1,  # 0 = no window = -1
            "logits_soft_cap": spec.soft_cap,
            "q_data_type": DTYPES[spec.dtype],
            "kv_data_type": DTYPES[spec.dtype],
        }
        if plan.decodes:
            wrapper.plan(start, pages, last, *sizes, **options)
            return
        query_start = torch.from_numpy(plan.query_start)
        wrapper.plan(query_start, start, pages, last, *sizes, causal=True, **options)

    def _wrapper(self, plan: PagedRows) -> Any:
        """One per group and kind of step: its plan holds until the group's next."""
        key = (plan.group.name, plan.decodes)
        if key not in self._wrappers:
            library = self._library()
            if plan.decodes:
                self._wrappers[key] = library.BatchDecodeWithPagedKVCacheWrapper(
                    self._space(), "NHD", use_tensor_cores=True, backend="fa2"
                )
            else:
                self._wrappers[key] = library.BatchPrefillWithPagedKVCacheWrapper(
                    self._space(), "NHD", backend="fa2"
                )
        return self._wrappers[key]

    def _space(self) -> Tensor:
        """Partial results live inside one call of one stream: all wrappers share their memory. The
        library wants it zero at first."""
        if self._workspace is None:
            self._workspace = self._device.empty((WORKSPACE,), torch.uint8).zero_()
        return self._workspace

    def _library(self) -> Any:
        return import_module("flashinfer")


def refusals(spec: AttentionSpec, facts: DeviceFacts) -> tuple[str, ...]:
    """All reasons why the library cannot serve `spec` on a device with these facts."""
    reasons = []
    version = facts.libraries.get(PACKAGE, "")
    if not version:
        reasons.append(f"{PACKAGE} is not installed (pip install {PACKAGE})")
    elif not VERSIONS[0] <= numbers(version)[:2] < VERSIONS[1]:
        reasons.append(f"written for {PACKAGE} 0.7, not {version}")
    if facts.arch < OLDEST_ARCH:
        has = ".".join(map(str, facts.arch)) or "unknown"
        reasons.append(f"needs compute capability 8.0, {facts.name} has {has}")
    if spec.head_dim not in HEAD_DIMS:
        sizes = ", ".join(map(str, HEAD_DIMS))
        reasons.append(f"head sizes {sizes}, not {spec.head_dim}")
    if spec.heads % spec.kv_heads:
        reasons.append(f"{spec.heads} heads do not divide among {spec.kv_heads} kv heads")
    if spec.dtype not in ("bfloat16", "float16"):
        reasons.append(f"serves bfloat16 and float16, not {spec.dtype}")
    if spec.stored_dtype != spec.dtype:
        reasons.append(f"keeps keys and values in {spec.dtype}, not {spec.stored_dtype}")
    if spec.sinks:
        reasons.append("attention sinks are not served by its FA2 kernels")
    return tuple(reasons)
