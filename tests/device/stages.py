"""What is run on a device, stage by stage. Each returns plain JSON values with "ok"."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from device.card import Card, Sizes
from device.speed import model_speed, operation_speed
from support.model_shapes import LLAMA_8B
from support.random_source import RandomSource
from support.tiny_torch_model import Driver

from sixfold.common.ops import OPS
from sixfold.common.ops.conformance import Verdict, run_suite
from sixfold.platforms import select
from sixfold.platforms.cpu.device import CpuDevice
from sixfold.platforms.interface import EngineSpec
from sixfold.platforms.interface_step import LAST_TOKEN
from sixfold.platforms.machine import observe
from sixfold.platforms.torch_runtime.executor import TorchExecutor

TINY: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "use_sliding_window": True,
    "sliding_window": 40,
    "max_window_layers": 2,
}
FULL = Sizes(
    model=LLAMA_8B,
    rows=(1, 8, 64),
    context=512,
    steps=64,
    contexts=(1024, 8192),
    copy_bytes=1 << 30,
    square=8192,
    linear=(4096, 14336),
    linear_rows=(1, 8, 64, 512),
    seconds=0.3,
)
SMALL = Sizes(
    model=TINY,
    rows=(1, 3),
    context=24,
    steps=4,
    contexts=(64,),
    copy_bytes=1 << 20,
    square=128,
    linear=(256, 512),
    linear_rows=(1, 4),
    seconds=0.01,
)


CONFORMANCE_SECONDS = 300


def environment(card: Card) -> dict[str, Any]:
    facts = {name: repr(value) for name, value in asdict(card.facts).items()}
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    return {"ok": True, "facts": facts, "versions": versions}


def conformance(card: Card) -> dict[str, Any]:
    """Every kernel and attention backend of the platform against its contract, on the device. Ops
    for which the time does not suffice are named; kernels compiled by then are kept for the next
    run. Attention comes last: it has the most kernels to compile."""
    ends = time.perf_counter() + CONFORMANCE_SECONDS
    suite = select.platforms()[card.platform].conformance(card.facts)
    verdicts: list[Verdict] = []
    left_out = []
    for title in sorted(OPS, key=lambda title: "attention" in title):
        if time.perf_counter() > ends:
            left_out.append(title)
        else:
            verdicts += run_suite(suite, {title: OPS[title]})
    table = [
        {"op": v.op, "provider": v.provider, "status": v.status, "passed": v.passed,
         "failed": v.failed, "errors": v.errors, "failures": [str(f) for f in v.failures[:3]],
         "refused": v.refused}
        for v in verdicts
    ]  # fmt: skip
    failed = [f"{v.op}={v.provider}" for v in verdicts if v.failed]
    ran = sum(v.passed + v.failed for v in verdicts)
    ok = not failed and not left_out and ran > 0
    return {"ok": ok, "ran": ran, "failed": failed, "left out": left_out, "kernels": table}


PROMPTS = [[5 + i for i in range(n)] for n in (3, 40, 17, 61, 8)]


def forced(executor: TorchExecutor, driver: Driver, steps: int) -> np.ndarray:
    """Log-probabilities (rows, steps + 1) of each row's best token, every row fed the same tokens
    whatever it sampled; rows prefilled one after the other, then decoded in batches that change."""
    ask = {"temperature": 0.0, "logprobs": 1}
    rows = range(len(PROMPTS))
    seen: dict[int, list[float]] = {row: [] for row in rows}

    def step(chosen: list[tuple[int, list[int]]]) -> None:
        executor.submit(driver.batch(chosen, params=[ask] * len(chosen)))
        result = executor.collect()
        if result.top_logprobs is None:
            raise RuntimeError("a step that was asked for log-probabilities gave none")
        for at, (row, _) in enumerate(chosen):
            seen[row].append(float(result.top_logprobs[at, 0]))

    for row in rows:
        step([(row, PROMPTS[row])])
    for number in range(steps):
        given = [(row, [(7 * number + row) % 500 + 1]) for row in rows]
        step(given[: 1 + number % len(given)])
        step(given[1 + number % len(given) :] or given[:1])
    least = min(len(values) for values in seen.values())
    return np.array([seen[row][:least] for row in rows])


def agreement(card: Card) -> dict[str, Any]:
    """A small model with windows on the device against the same on the CPU's generic kernels in
    float32, the same tokens fed to both."""
    fields = {"max_rows": 8, "cache_tokens": 4096, "max_context": 256}
    wanted = reference(fields)
    results: dict[str, Any] = {}
    for dtype, most in {card.dtype: 0.25, "float32": 2e-2}.items():
        executor, info = card.executor(TINY, dtype=dtype, **fields)
        got = forced(executor, Driver(info, seed=2), 6)
        executor.close()
        largest = float(np.abs(got - wanted).max())
        results[dtype] = {"largest difference": largest, "allowed": most}
    ok = all(r["largest difference"] <= r["allowed"] for r in results.values())
    return {"ok": ok, **results}


def reference(fields: dict[str, Any]) -> np.ndarray:
    """By the CPU's generic kernels."""
    facts = select.probe_all(observe())["cpu"].devices[0]
    device = CpuDevice(facts)
    spec = EngineSpec("", dtype="float32", graphs="off", **fields)
    executor = TorchExecutor(spec, device, None, lambda _: RandomSource(TINY))
    try:
        return forced(executor, Driver(executor.load(), seed=2), 6)
    finally:
        executor.close()


def graphs(card: Card) -> dict[str, Any]:
    """Steps replayed and steps run op by op, on the same traffic: greedy tokens of free-running
    rows, and log-probabilities of rows that are fed."""
    fields = {"max_rows": 12, "cache_tokens": 4096, "max_context": 256}
    captured, info = card.executor(TINY, dtype=card.dtype, **fields)
    decision = {d.what: d for d in info.decisions}["step"]
    plain, _ = card.executor(TINY, dtype=card.dtype, graphs="off", **fields)
    pairs = [forced(made, Driver(info, seed=2), 12) for made in (captured, plain)]
    tokens = [free_running(made, Driver(info, seed=4)) for made in (captured, plain)]
    captured.close()
    plain.close()
    largest = float(np.abs(pairs[0] - pairs[1]).max())
    equal = float(np.mean(tokens[0] == tokens[1]))
    return {
        "ok": decision.chosen in ("captured", "recorded") and largest <= 0.1,
        "step": f"{decision.chosen}: {decision.because}",
        "largest difference": largest,
        "equal greedy tokens": equal,
    }


def free_running(executor: TorchExecutor, driver: Driver) -> np.ndarray:
    rows = range(len(PROMPTS))
    for row in rows:
        executor.submit(driver.batch([(row, PROMPTS[row])]))
        executor.collect()
    made = []
    for _ in range(16):
        executor.submit(driver.batch([(row, [LAST_TOKEN]) for row in rows]))
        made.append(executor.collect().token_ids[:, 0])
    return np.array(made)


STAGES: dict[str, Callable[[Card], dict[str, Any]]] = {
    "environment": environment,
    "conformance": conformance,
    "agreement": agreement,
    "graphs": graphs,
    "operations": operation_speed,
    "model": model_speed,
}
"""In order: what is cheap and tells most comes first."""
