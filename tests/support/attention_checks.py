"""Runs an attention backend (plan, bind, run) on cases of the `attention` contract."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from support.kernel_checks import cpu_facts, cpu_registry

from sixfold.common.ops.sample_cases import sampling_arrays
from sixfold.platforms.cpu.device import CpuDevice
from sixfold.platforms.interface_attention import AttentionBackend, AttentionSpec
from sixfold.platforms.interface_kernels import Case, Problem
from sixfold.platforms.interface_kv import KVGroup, KVKind
from sixfold.platforms.interface_step import StepBatch
from sixfold.platforms.torch_runtime.attention import SdpaAttention
from sixfold.platforms.torch_runtime.dtypes import DTYPES
from sixfold.platforms.torch_runtime.pools import TorchKVPool

LAYERS = 2
LAYER = 1  # the layer under test; the other one must keep its content


def cpu_device() -> CpuDevice:
    return CpuDevice(cpu_facts(), threads=1)


def cpu_backends() -> list[AttentionBackend]:
    return [SdpaAttention(cpu_device())]


def step_batch(args: dict[str, Any], group: str) -> StepBatch:
    rows = len(args["context_lens"])
    return StepBatch(
        step=0,
        row_ids=np.arange(rows, dtype=np.int32),
        token_ids=np.zeros(len(args["q"]), np.int32),
        query_start=args["query_start"],
        context_lens=args["context_lens"],
        page_tables={group: args["page_table"]},
        want=np.zeros(rows, np.uint8),
        sampling=sampling_arrays([{}] * rows),
    )


def run_case(
    backend: AttentionBackend, case: Case, dtype: str, kv_dtype: str = ""
) -> tuple[np.ndarray, TorchKVPool]:
    """(T, heads, dim) and the pool afterwards."""
    args = dict(case.args)
    size, window = args["page_size"], args["window"]
    slots, kv_heads, dim = args["keys"].shape
    group = KVGroup("g", KVKind.WINDOW if window else KVKind.FULL, size, slots // size, window)
    spec = AttentionSpec(
        args["q"].shape[1], kv_heads, dim, args["scale"], window, args["soft_cap"],
        sinks=args["sinks"] is not None, dtype=dtype, kv_dtype=kv_dtype,
    )  # fmt: skip
    refused = backend.accepts(spec, cpu_facts())
    if refused:
        raise AssertionError(f"{backend.name} refuses {case.name}: {refused}")
    table = cpu_registry().resolve(
        [Problem(op, dtype) for op in ("kv_write", "page_copy")], cpu_facts(), {}
    )
    device = cpu_device()
    pool = TorchKVPool(group, backend.layout(group, spec, LAYERS), device, table)
    fill(pool, args["keys"], args["values"])
    q, k, v = (torch.from_numpy(args[name]).to(DTYPES[dtype]) for name in "qkv")
    with torch.inference_mode():
        bound = backend.bind(backend.plan(step_batch(args, "g"), group))
        sinks = None if args["sinks"] is None else torch.from_numpy(args["sinks"])
        result = backend.run(bound, pool, LAYER, q, k, v, spec, sinks)
    return result.float().numpy(), pool


def fill(pool: TorchKVPool, keys: np.ndarray, values: np.ndarray) -> None:
    """Layer 1 by slots as given, the other layers a sentinel."""
    pool.data.fill_(7)
    everywhere = torch.arange(len(keys))
    dtype = pool.data.dtype
    k, v = (
        to_int8_rows(x) if dtype == torch.int8 else torch.from_numpy(x).to(dtype)
        for x in (keys, values)
    )
    pool.write(LAYER, everywhere, k, v)


def to_int8_rows(x: np.ndarray) -> torch.Tensor:
    """x (..., dim) float32 -> (..., dim + 4) int8: whole steps of a 127th of a row's largest
    magnitude, then that step as a float32."""
    step = np.abs(x).max(-1, keepdims=True) / np.float32(127)
    q = np.nan_to_num(np.rint(x / np.where(step > 0, step, 1))).astype(np.int8)
    return torch.from_numpy(np.concatenate((q, step.astype("<f4").view(np.int8)), -1))


def from_int8_rows(rows: np.ndarray) -> np.ndarray:
    step = np.ascontiguousarray(rows[..., -4:]).view("<f4")
    return rows[..., :-4].astype(np.float32) * step
