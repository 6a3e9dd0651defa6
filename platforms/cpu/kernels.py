"""Kernels that a CPU has beside the generic ones; which linear one is preferred was measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ...common.checkpoint.gguf_blocks import SCHEMES
from ...common.checkpoint.packed_schemes import PACKED
from ...common.checkpoint.quantised_rows import GROUP, QuantisedRows
from ...common.errors import KernelError
from ...common.ops.registry import KernelRegistry
from ..interface import DeviceFacts
from ..interface_kernels import Kernel, Problem
from ..torch_runtime.sampler import sample
from .device import CpuDevice
from .linear_preference import preference
from .native_attention import NativeAttention
from .native_library import missing
from .native_ops import NativeOps
from .packed_experts import PackedExperts, join
from .packed_experts import dismantle as dismantle_experts
from .packed_experts import restore as restore_experts
from .packing import (
    PackedWeight,
    dismantle,
    pack_floats,
    pack_stored,
    quantise_int4,
    quantise_int8,
    restore,
)

NATIVE = 20
"""Priority of the native kernels of ops that only the generic ones serve beside them."""
SHORTLIST = 512
"""Best tokens tried before a whole vocabulary is sorted; a top-p of 0.95 rarely needs more."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """oneDNN's matrix product on weights as they are, not repacked: nothing is stored twice."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _needs_onednn(facts: DeviceFacts, problem: Problem) -> str | None:
    if problem.weights:
        return f"has no {problem.weights} weights"
    if not torch.backends.mkldnn.is_available():
        return "this torch build has no oneDNN"
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this torch build has no mkldnn::_linear_pointwise"
    if problem.dtype != "float32":
        return f"serves float32, not {problem.dtype}"
    return None


def _always(facts: DeviceFacts, problem: Problem) -> None:
    return None


NATIVE_OPS = (
    "embedding linear rms_norm add_rms_norm rope_angles rope qk_norm_rope silu_mul gelu_tanh_mul "
    "moe"
).split()
MATRIX_OPS = {"embedding", "linear"}
"""Ops whose weight is packed at load."""
WEIGHTS = frozenset({"", "bfloat16", "float16", "int8", "int4"}) | SCHEMES | PACKED
"""Schemes that `pack` has a form for."""
ROUNDED = f"int8, a scale per {GROUP} numbers"


def pack(weight: Tensor | QuantisedRows, problem: Problem) -> PackedWeight:
    if isinstance(weight, QuantisedRows):
        if problem.op == "embedding" and weight.order is not None:
            raise KernelError("An embedding with columns out of order is not served.")
        return pack_stored(weight)
    if problem.weights == "int8":
        return quantise_int8(weight)
    if problem.weights == "int4":
        return quantise_int4(weight)
    return pack_floats(weight)


def pack_experts(weights: Tensor | Iterable[QuantisedRows], problem: Problem) -> PackedExperts:
    """weights (experts, parts * n, k), or its matrices (n, k) one after the other."""
    if isinstance(weights, Tensor):
        weights = weights.unflatten(1, (problem.dims["parts"], -1)).flatten(0, 1)
    return join(pack(matrix, problem) for matrix in weights)


def _needs_native(facts: DeviceFacts, problem: Problem) -> str | None:
    if problem.dtype != "float32":
        return f"computes in float32, not {problem.dtype}"
    if problem.weights not in WEIGHTS:
        return f"has no {problem.weights} weights"
    return missing()


def register_native(registry: KernelRegistry, device: CpuDevice, linear: int) -> None:
    """`linear` is the priority of that op, which has a third provider. Registered also where there
    is no library, so that the reason is in the record."""
    issuer = device.issuer
    ops = None if issuer is None else NativeOps(issuer)
    for op in NATIVE_OPS:
        fn = getattr(ops, op, _absent)
        kernel = Kernel(op, "native", _needs_native, fn, linear if op == "linear" else NATIVE)
        if op in MATRIX_OPS:
            kernel = replace(kernel, prepare=pack, dismantle=dismantle, restore=restore)
        if op in ("linear", "moe"):
            kernel = replace(kernel, activations=ROUNDED)
        if op == "moe":
            kernel = replace(
                kernel, prepare=pack_experts, dismantle=dismantle_experts, restore=restore_experts
            )
        registry.add(kernel)
    if issuer is not None:
        registry.add_attention(NativeAttention(issuer), priority=NATIVE)


def _absent(*args: object) -> None:
    raise KernelError(f"There are no native kernels: {missing()}.")


def register(registry: KernelRegistry, device: CpuDevice) -> None:
    priorities = preference(device.facts.features).priorities
    register_native(registry, device, priorities["native"])
    registry.add(Kernel("linear", "onednn", _needs_onednn, linear, priorities["onednn"]))
    # Reading a value costs nothing where the host is the device.
    host_sample = partial(sample, shortlist=SHORTLIST)
    registry.add(Kernel("sample", "shortlist", _always, host_sample, priority=10))
