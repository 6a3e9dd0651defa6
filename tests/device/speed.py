"""Speed on a device, as a share of what the device was measured to do: copy and matrix product."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from device.card import Card, seconds_of
from support.tiny_torch_model import Driver
from torch import Tensor

from sixfold.common.ops.sample_cases import sampling_arrays
from sixfold.platforms.interface_attention import AttentionSpec
from sixfold.platforms.interface_kernels import Kernel, KernelTable, Problem
from sixfold.platforms.interface_kv import KVGroup, KVKind
from sixfold.platforms.interface_step import LAST_TOKEN, StepBatch
from sixfold.platforms.torch_runtime.executor import TorchExecutor
from sixfold.platforms.torch_runtime.kernels import kv_write
from sixfold.platforms.torch_runtime.pools import TorchKVPool

PAGE, WIDE_PAGE = 16, 128  # what most backends have, and the widest that one asks for
DTYPE = torch.bfloat16


@torch.inference_mode()
def limits(card: Card) -> dict[str, float]:
    """Bytes a second of a copy (read plus written), operations a second of a product."""
    device, _ = card.device()
    half = card.sizes.copy_bytes // 2
    source, target = (device.empty((half,), torch.uint8).fill_(1) for _ in range(2))
    copied, _ = seconds_of(device, lambda: target.copy_(source), card.sizes.seconds)
    side = card.sizes.square
    a, b = (device.empty((side, side), DTYPE).normal_() for _ in range(2))
    multiplied, _ = seconds_of(device, lambda: a @ b, card.sizes.seconds)
    return {"copy bytes/s": 2 * half / copied, "product flop/s": 2 * side**3 / multiplied}


def operation_speed(card: Card) -> dict[str, Any]:
    found = limits(card)
    attention = attention_speed(card, found["copy bytes/s"])
    linear = linear_speed(card, found["copy bytes/s"], found["product flop/s"])
    broken = [one for one in attention if "error" in one]
    return {"ok": not broken, "limits": found, "attention": attention, "linear": linear}


@torch.inference_mode()
def attention_speed(card: Card, bandwidth: float) -> list[dict[str, Any]]:
    """One layer's decode of Llama 8B's heads, by every backend that takes it."""
    device, registry = card.device()
    model = card.sizes.model
    dim = model["head_dim"]
    heads = model["num_attention_heads"], model["num_key_value_heads"]
    spec = AttentionSpec(*heads, dim, dim**-0.5, dtype="bfloat16")
    results = []
    for backend in registry.backends():
        refused = backend.accepts(spec, card.facts)
        if refused:
            results.append({"backend": backend.name, "refused": list(refused)})
            continue
        for rows in card.sizes.rows:
            for context in card.sizes.contexts:
                one = {"backend": backend.name, "rows": rows, "context": context}
                try:
                    work = decode_work(device, backend, spec, rows, context)
                    took, how = seconds_of(device, work, card.sizes.seconds)
                except Exception as error:  # one backend's fault is a result, not the end
                    results.append({**one, "error": f"{type(error).__name__}: {error}"[:300]})
                    continue
                read = rows * context * 2 * spec.kv_heads * dim * 2
                share = read / took / bandwidth
                results.append({**one, "seconds": took, "share of copy": share, "how": how})
    return results


def decode_work(
    device: Any, backend: Any, spec: AttentionSpec, rows: int, context: int
) -> Callable[[], Tensor]:
    size = getattr(backend, "page_size", PAGE)
    each = -(-context // size)
    group = KVGroup("speed", KVKind.FULL, size, 1 + rows * each)
    kernel = Kernel("kv_write", "generic", lambda facts, problem: None, kv_write)
    table = KernelTable({"kv_write": kernel}, ())
    pool = TorchKVPool(group, backend.layout(group, spec, 1), device, table)
    pool.data.normal_()
    pages = np.random.default_rng(0).permutation(np.arange(1, group.pages))
    batch = StepBatch(
        step=0,
        row_ids=np.arange(rows, dtype=np.int32),
        token_ids=np.zeros(rows, np.int32),
        query_start=np.arange(rows + 1, dtype=np.int32),
        context_lens=np.full(rows, context - 1, np.int32),
        page_tables={"speed": pages.reshape(rows, each).astype(np.int32)},
        want=np.zeros(rows, np.uint8),
        sampling=sampling_arrays([{}] * rows),
    )
    bound = backend.bind(backend.plan(batch, group))
    q = device.empty((rows, spec.heads, spec.head_dim), DTYPE).normal_()
    k, v = (device.empty((rows, spec.kv_heads, spec.head_dim), DTYPE).normal_() for _ in "kv")
    return lambda: backend.run(bound, pool, 0, q, k, v, spec)


@torch.inference_mode()
def linear_speed(card: Card, bandwidth: float, flops: float) -> list[dict[str, Any]]:
    """Every provider of `linear`; weights are read from memory, not from a cache: several copies
    take turns."""
    device, registry = card.device()
    inputs, outputs = card.sizes.linear
    results = []
    for kernel in registry.kernels():
        if kernel.op != "linear":
            continue
        for weights in ("", "fp8"):
            problem = Problem("linear", "bfloat16", {"k": inputs, "n": outputs}, weights)
            reason = kernel.requires(card.facts, problem)
            named = {"provider": kernel.provider, "weights": weights or "bfloat16"}
            if reason is not None:
                results.append({**named, "refused": reason})
                continue
            matrix: Any = device.empty((outputs, inputs), DTYPE).normal_()
            if kernel.prepare is not None:
                matrix = kernel.prepare(matrix, problem)
            for rows in card.sizes.linear_rows:
                x = device.empty((rows, inputs), DTYPE).normal_()
                took, how = seconds_of(
                    device, lambda k=kernel, x=x, m=matrix: k.fn(x, m, None), card.sizes.seconds
                )
                read = inputs * outputs * (1 if weights else 2)
                results.append(
                    {**named, "rows": rows, "seconds": took, "how": how,
                     "share of copy": read / took / bandwidth,
                     "share of product": 2 * rows * inputs * outputs / took / flops}
                )  # fmt: skip
    return results


def model_speed(card: Card) -> dict[str, Any]:
    """Llama 8B of random weights, end to end: decode steps at each number of rows, with and without
    graphs. The share is of the time that reading weights, keys and values once would take."""
    bandwidth = limits(card)["copy bytes/s"]
    results = []
    for choice in ("on", "off"):
        try:
            results += model_runs(card, choice, bandwidth)
        except Exception as error:  # one way's fault is a result, the other is still run
            results.append({"graphs": choice, "error": f"{type(error).__name__}: {error}"[:1000]})
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
    return {"ok": not any("error" in run for run in results), "runs": results}


def model_runs(card: Card, choice: str, bandwidth: float) -> list[dict[str, Any]]:
    """`choice` "on": as the device decides, with the decision in the result."""
    sizes = card.sizes
    most, longest = max(sizes.rows), sizes.context + 2 * sizes.steps + PAGE
    room = -(-longest // WIDE_PAGE) * WIDE_PAGE
    fields: dict[str, Any] = {
        "dtype": card.dtype,
        "max_rows": most,
        "max_context": longest,
        "cache_tokens": (most + 1) * room,
        "graphs": "off" if choice == "off" else None,
    }
    began = time.perf_counter()
    executor, info = card.executor(sizes.model, **fields)
    loaded = time.perf_counter() - began
    chosen = {d.what: d.chosen for d in info.decisions}
    token_bytes = info.cache_bytes / (info.groups[0].pages * info.page_size)
    results = []
    for rows in sizes.rows:
        prefill, decode = timed_steps(executor, Driver(info), rows, sizes)
        least = (info.weight_bytes + rows * sizes.context * token_bytes) / bandwidth
        results.append(
            {"graphs": choice, "step": chosen["step"], "attention": chosen["kernel attention"],
             "rows": rows, "load seconds": loaded, "decode seconds": decode,
             "prefill tokens/s": rows * sizes.context / prefill, "decode tokens/s": rows / decode,
             "share of copy": least / decode}
        )  # fmt: skip
    executor.close()
    return results


def timed_steps(
    executor: TorchExecutor, driver: Driver, rows: int, sizes: Any
) -> tuple[float, float]:
    """Seconds of the whole prefill, and the median of a decode step."""

    def step(chosen: list[tuple[int, list[int]]]) -> float:
        batch = driver.batch(chosen)
        began = time.perf_counter()
        executor.submit(batch)
        executor.collect()
        return time.perf_counter() - began

    prompt = [1 + i % 250 for i in range(sizes.context)]
    together = max(1, 2048 // sizes.context)
    chunks = [list(range(at, min(at + together, rows))) for at in range(0, rows, together)]
    prefill = sum(step([(row, prompt) for row in chunk]) for chunk in chunks)
    decode = [step([(row, [LAST_TOKEN]) for row in range(rows)]) for _ in range(sizes.steps)]
    return prefill, sorted(decode)[len(decode) // 2]
