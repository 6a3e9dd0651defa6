"""Adds the Triton kernels to a platform's registry. Importing this module imports no Triton: where
there is none, that is the reason in the record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ...common.checkpoint.gguf_blocks import SCHEMES as GGUF
from ...common.checkpoint.packed_schemes import PACKED
from ..interface import DeviceFacts
from ..interface_kernels import Kernel, Problem
from . import tuning
from .refused import RefusedAttention, refused_kernel

if TYPE_CHECKING:
    from torch import Tensor

    from ...common.ops.registry import KernelRegistry
    from ..torch_runtime.device import TorchDevice
    from .packed_experts import PackedExperts
    from .packed_matrix import PackedMatrix

PRIORITY = 10
"""Above the generic kernels, below what a platform has of its own."""

OPS = {
    "rms_norm": "norm",
    "add_rms_norm": "norm",
    "rope": "rope",
    "qk_norm_rope": "rope",
    "layer_norm": "norm",
    "silu_mul": "pointwise",
    "clamped_swiglu": "pointwise",
    "gelu_tanh_mul": "pointwise",
    "embedding": "pointwise",
    "kv_write": "paging",
    "page_copy": "paging",
    "page_digest": "paging",
    "sample": "sampling",
    "draw": "sampling",
    "moe": "moe",
    "moe_experts": "experts",
    "linear": "linear",
    "gated_delta": "gated_delta",
    "conv1d_update": "short_conv",
    "latent_attention": "vector_attention",
    "compressed_attention": "vector_attention",
    "merge_state": "merge_state",
    "mhc_pre": "hyper_connections",
    "mhc_post": "hyper_connections",
    "mhc_post_pre": "hyper_connections",
    "mhc_head": "hyper_connections",
    "compress_norm_rope_store": "compress",
    "index_topk": "index_topk",
    "inverse_rope_quant": "fp8_rows",
    "qk_norm_rope_quant": "fp8_rows",
}
"""Op -> the module that has its kernel."""

EXPERTS = ("moe", "moe_experts")
PRODUCTS = frozenset({"linear", *EXPERTS})
"""Ops that multiply matrices in the dtype of their inputs."""

INTEGERS = PACKED | GGUF | {"int8", "int4"}
"""Schemes of whole numbers; the last two are made on load."""
SCHEMES = INTEGERS | {"fp8_block", "mxfp4"}

WEIGHTS = {"linear": SCHEMES, "embedding": INTEGERS, **dict.fromkeys(EXPERTS, SCHEMES)}
"""Op -> schemes of its matrix. Plain ones beside quantised ones take torch's product in `linear`; a
model that has plain ones alone is left to torch."""

STREAMS = frozenset({"mhc_pre", "mhc_post", "mhc_post_pre", "mhc_head"})
WHOLE_ROWS = STREAMS | {"rms_norm", "add_rms_norm", "layer_norm"}
VECTORS = frozenset({"latent_attention", "compressed_attention", "index_topk"})
"""Ops where one vector serves all heads."""

DTYPES = ("float32", "float16", "bfloat16")

MOST_COLUMNS = 1 << 15
"""Of a row that has to lie in one tile."""


def missing() -> str | None:
    return None if find_spec("triton") else "triton is not installed"


def requires(facts: DeviceFacts, problem: Problem) -> str | None:
    reason = missing() or tuning.refusal(facts)
    if reason is not None:
        return reason
    if problem.weights and problem.weights not in WEIGHTS.get(problem.op, ()):
        return f"has no {problem.weights} weights"
    if problem.dtype not in DTYPES:
        return f"serves {', '.join(DTYPES)}, not {problem.dtype}"
    if problem.dtype not in facts.dtypes:
        return f"{facts.name} does not compute in {problem.dtype}"
    return _misfit(facts, problem)


def _misfit(facts: DeviceFacts, problem: Problem) -> str | None:
    """Why what a program keeps of a row does not fit its tiles or registers, or None."""
    dims, cut = problem.dims, tuning.choose(facts)
    if problem.op in WHOLE_ROWS and dims.get("width", 0) > MOST_COLUMNS:
        return f"rows of up to {MOST_COLUMNS} columns, not {dims['width']}"
    if problem.op in STREAMS:
        streams = dims.get("streams", 1)
        if streams & (streams - 1):
            return f"a power of two of streams, not {streams}"
    if problem.op in VECTORS:
        value = dims.get("value_dim", dims.get("dim", 0))
        most = cut.float32_dim if problem.dtype == "float32" else cut.vector_dim
        if value > most:
            return (
                f"vectors of up to {most} numbers in {problem.dtype} on {facts.name}, not {value}"
            )
    return None


def register_triton(registry: KernelRegistry, device: TorchDevice) -> None:
    """The kernels and the attention backend, for the facts of `device`; where it can have none they
    are registered all the same, to be refused with the reason."""
    reason = missing() or tuning.refusal(device.facts)

    def prepare(weight: Any, problem: Problem) -> Tensor | PackedMatrix:
        from .packed_matrix import pack

        return pack(weight, problem, device)

    def prepare_stack(weights: Any, problem: Problem) -> Tensor | PackedExperts:
        from .packed_experts import pack_experts

        return pack_experts(weights, problem, device)

    for op, module in OPS.items():
        fn = partial(refused_kernel, reason) if reason else _bound(module, op, device)
        kernel = Kernel(op, "triton", requires, fn, PRIORITY)
        if op in WEIGHTS:
            kernel = replace(kernel, prepare=prepare_stack if op in EXPERTS else prepare)
        registry.add(replace(kernel, schemes=SCHEMES) if op == "linear" else kernel)
    if reason:
        registry.add_attention(RefusedAttention(reason), PRIORITY)
    else:
        backend = import_module(".attention", __package__).TritonAttention(device)
        registry.add_attention(backend, PRIORITY)


def _bound(module: str, op: str, device: TorchDevice) -> Callable[..., Any]:
    fn = partial(getattr(import_module(f".{module}", __package__), op), tuning.choose(device.facts))
    return partial(fn, wide=device.sums) if module == "sampling" else fn
