"""What is compiled for every target: each wrapper called with the sizes of real models (Llama 3 8B,
Qwen3, Gemma 3), so that Triton specialises as it will when they are served. Tensors are taken and
never written, so that they cost no memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from compile_targets import Target
from compile_workload_fp8 import rounding
from compile_workload_mixers import compressing, recurrent, streams, tensor, vectors

from sixfold.common.ops.registry import KernelRegistry
from sixfold.common.ops.sample_cases import sampling_arrays
from sixfold.platforms.interface_attention import AttentionSpec
from sixfold.platforms.interface_kv import KVGroup, KVKind
from sixfold.platforms.torch_runtime.device import TorchDevice
from sixfold.platforms.torch_runtime.kernels import register_generic
from sixfold.platforms.torch_runtime.pools import TorchKVPool
from sixfold.platforms.triton_kernels import packed_matrix as packed
from sixfold.platforms.triton_kernels.packed_experts import PackedExperts
from sixfold.platforms.triton_kernels.packed_matrix import PackedMatrix
from sixfold.platforms.triton_kernels.register import register_triton

TOKENS, WIDTH, INNER, PAGE = 48, 4096, 14336, 16
CACHE_BYTES = 3 << 30
"""More than 2 GiB: what fits 32-bit offsets is compiled otherwise on AMD."""


def work(target: Target) -> dict[str, Callable[[], object]]:
    """By name, in an order that stays: of kernels that two share, the first has the line."""
    device = TorchDevice(target.facts, "cpu")
    registry = KernelRegistry()
    register_generic(registry, device)
    register_triton(registry, device)
    ops = {kernel.op: kernel.fn for kernel in registry.kernels() if kernel.provider == "triton"}
    backend = next(b for b in registry.backends() if b.name == "triton")
    return {
        **_pointwise(ops),
        **_paging(ops),
        **_attention(backend, device),
        **_others(ops),
        **_quantised(ops),
        **_experts(ops),
        **recurrent(ops),
        **vectors(ops, target.facts),
        **streams(ops),
        **compressing(ops),
        **rounding(ops),
    }


def _pointwise(ops: dict[str, Any]) -> dict[str, Callable[[], object]]:
    x, weight = tensor(TOKENS, WIDTH), tensor(WIDTH)
    gate = tensor(TOKENS, INNER)
    q, k = tensor(TOKENS, 32, 128), tensor(TOKENS, 8, 128)
    angles = [tensor(TOKENS, 64, dtype=torch.float32) for _ in range(2)]
    ids = torch.empty(TOKENS, dtype=torch.int64)
    return {
        "rms_norm 4096": partial(ops["rms_norm"], x, weight, 1e-5),
        "add_rms_norm 4096": partial(ops["add_rms_norm"], x, x, weight, 1e-5),
        "rope 128": partial(ops["rope"], q, k, *angles),
        "qk_norm_rope 128": partial(
            ops["qk_norm_rope"], q, k, weight[:128], weight[:128], 1e-6, *angles
        ),
        "silu_mul": partial(ops["silu_mul"], gate, gate),
        "gelu_tanh_mul": partial(ops["gelu_tanh_mul"], gate, gate),
        "layer_norm 4096": partial(ops["layer_norm"], x, weight, weight, 1e-5),
        "clamped_swiglu": partial(ops["clamped_swiglu"], gate, gate, 7.0, 1.702, 1.0),
        "embedding": partial(ops["embedding"], ids, tensor(1024, WIDTH)),
    }


def _paging(ops: dict[str, Any]) -> dict[str, Callable[[], object]]:
    pool = tensor(2, 8, PAGE, 8, 128)
    pages = torch.empty(4, dtype=torch.int64)
    return {
        "page_copy": partial(ops["page_copy"], pool, pages, pages),
        "page_digest": partial(ops["page_digest"], pool[0], pages),
    }


def _attention(backend: Any, device: TorchDevice) -> dict[str, Callable[[], object]]:
    """One reservation with rows that decode and rows that do not: all three kernels."""
    shapes = {
        "128": AttentionSpec(32, 8, 128, 0.1, dtype="bfloat16"),
        "64, window, sinks": AttentionSpec(64, 8, 64, 0.1, 128, sinks=True, dtype="bfloat16"),
        "256": AttentionSpec(8, 4, 256, 0.1, dtype="bfloat16"),
        "64, float32, soft cap": AttentionSpec(8, 8, 64, 0.1, soft_cap=30.0),
        "80, float32": AttentionSpec(8, 8, 80, 0.1),
        "128, int8": AttentionSpec(32, 8, 128, 0.1, dtype="bfloat16", kv_dtype="int8"),
        "64, window, sinks, int8": AttentionSpec(
            64, 8, 64, 0.1, 128, sinks=True, dtype="bfloat16", kv_dtype="int8"
        ),
    }
    return {
        f"attention {name}": partial(_attend, backend, device, spec)
        for name, spec in shapes.items()
        if not backend.accepts(spec, device.facts)
    }


def _attend(backend: Any, device: TorchDevice, spec: AttentionSpec) -> None:
    dtype = getattr(torch, spec.dtype)
    page_bytes = 2 * PAGE * spec.kv_heads * spec.head_dim * dtype.itemsize
    kind = KVKind.WINDOW if spec.window else KVKind.FULL
    group = KVGroup("g", kind, PAGE, CACHE_BYTES // page_bytes, spec.window)
    pool = TorchKVPool(group, backend.layout(group, spec, 1), device, None)  # type: ignore[arg-type]
    bound = backend.reserve(group, 8, TOKENS, longest=4096)
    q = tensor(TOKENS, spec.heads, spec.head_dim, dtype=dtype)
    k, v = (tensor(TOKENS, spec.kv_heads, spec.head_dim, dtype=dtype) for _ in range(2))
    sinks = tensor(spec.heads, dtype=torch.float32) if spec.sinks else None
    backend.run(bound, pool, 0, q, k, v, spec, sinks)


def _others(ops: dict[str, Any]) -> dict[str, Callable[[], object]]:
    logits = tensor(4, 128256, dtype=torch.float32)
    x, chosen = tensor(TOKENS, 2048), tensor(TOKENS, 128)
    experts = tensor(128, 2 * 768, 2048), tensor(128, 2048, 768)
    return {
        "sample": partial(ops["sample"], logits, sampling_arrays([{"temperature": 0.7}] * 4)),
        "moe, 8 of 128": partial(ops["moe"], x, chosen, *experts, 8, True),
    }


def _quantised(ops: dict[str, Any]) -> dict[str, Callable[[], object]]:
    """`linear` for few rows and for many, and the lookup in a table rounded on load."""
    half, n = torch.float16, INNER
    shapes = {
        "int8, by output": _matrix(packed.INT8, 0, half),
        "int8, 32": _matrix(packed.INT8, 32, half),
        "int4, 128": _matrix(packed.INT4, 128, half),
        "int4, 128, zeros": _matrix(packed.INT4, 128, half, shift=packed.ZEROS),
        "int4, 32, minimums": _matrix(packed.INT4, 32, half, shift=packed.MINIMUMS),
        "int8, 32, minimums": _matrix(packed.INT8, 32, half, shift=packed.MINIMUMS),
        "int8, 16": _matrix(packed.INT8, 16, half),
        "fp8, 128 by 128": _matrix(packed.FP8, 128, torch.float32, 128),
        "mxfp4": _matrix(packed.MXFP4, 32, torch.uint8),
    }
    work: dict[str, Callable[[], object]] = {}
    for name, matrix in shapes.items():
        for rows in (4, 512):
            run = partial(ops["linear"], tensor(rows, WIDTH), matrix)
            work[f"linear {name}, {rows} rows"] = run
    biased = partial(ops["linear"], bias=tensor(n, dtype=torch.float32))
    for name in ("int8, by output", "int4, 128, zeros"):
        x = tensor(4, WIDTH, dtype=torch.float32)
        work[f"linear {name}, float32, bias"] = partial(biased, x, shapes[name])
    ids = torch.empty(TOKENS, dtype=torch.int64)
    for name in ("int8, 32", "int8, 16"):
        work[f"embedding {name}"] = partial(ops["embedding"], ids, shapes[name])
    return work


def _experts(ops: dict[str, Any]) -> dict[str, Callable[[], object]]:
    """Eight of 256 experts (DeepSeek-V3, in half of its width), of a decode step and of a prompt;
    and with the biases and the activation of GPT-OSS."""
    count, inner, width, half = 256, 256, 3584, torch.float16
    plain = tensor(count, 2 * inner, width), tensor(count, width, inner)
    forms: dict[str, tuple[Any, Any]] = {"plain": plain}
    for name, given in {
        "fp8, 128 by 128": (packed.FP8, 128, torch.float32, 128),
        "int8, by output": (packed.INT8, 0, half),
        "int4, 128, zeros": (packed.INT4, 128, half, 1, packed.ZEROS),
        "mxfp4": (packed.MXFP4, 32, torch.uint8),
    }.items():
        both = _matrix(*given, shape=(2 * count * inner, width))
        down = _matrix(*given, shape=(count * width, inner))
        forms[name] = PackedExperts(2 * count, both), PackedExperts(count, down)
    biases = tensor(count, 2 * inner), tensor(count, width)
    gpt_oss = {"limit": 7.0, "slope": 1.702, "offset": 1.0}
    work: dict[str, Callable[[], object]] = {}
    for rows in (4, 4096):
        routes = torch.zeros(rows, 8, dtype=torch.int64), tensor(rows, 8, dtype=torch.float32)
        for name, stacks in forms.items():
            run = partial(ops["moe_experts"], tensor(rows, width), *routes, *stacks)
            if name == "mxfp4":
                run = partial(run, *biases, **gpt_oss)
            work[f"moe_experts {name}, {rows} rows"] = run
    wide = [tensor(8, 2 * n, k, dtype=torch.float32) for n, k in ((64, 512), (256, 64))]
    x, ids = tensor(4, 512, dtype=torch.float32), torch.zeros(4, 8, dtype=torch.int64)
    experts = partial(ops["moe_experts"], x, ids, tensor(4, 8, dtype=torch.float32), *wide)
    return {**work, "moe_experts plain, float32": experts}


def _matrix(
    form: int,
    group: int,
    scales: torch.dtype,
    squares: int = 1,
    shift: int = packed.PLAIN,
    shape: tuple[int, int] = (INNER, WIDTH),
) -> PackedMatrix:
    n, k = shape
    paired = form in (packed.INT4, packed.MXFP4)
    data = tensor(n, k // 2 if paired else k, dtype=torch.uint8)
    if form == packed.INT8:
        data = data.view(torch.int8)
    groups = k // group if group else 1
    kind = torch.int8 if shift == packed.ZEROS else torch.float16
    return PackedMatrix(
        form,
        shape,
        torch.bfloat16,
        data,
        tensor(groups, -(-n // squares), dtype=scales),
        group,
        squares,
        shift,
        tensor(groups, n, dtype=kind) if shift else None,
    )
