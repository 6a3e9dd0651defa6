"""Guards the whole: a two-layer Llama on the Triton kernels in the interpreter, through the
executor, gives the greedy tokens that it gives on the generic kernels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from support.kernel_checks import cpu_facts
from support.tiny_models import Tiny, save
from support.tiny_torch_model import Driver
from support.triton_checks import InterpretedDevice, triton_facts

from sixfold.common.ops.registry import KernelRegistry
from sixfold.platforms.interface import EngineSpec, ExecutorInfo
from sixfold.platforms.interface_step import LAST_TOKEN
from sixfold.platforms.torch_runtime.executor import TorchExecutor
from sixfold.platforms.triton_kernels.register import register_triton

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [27, 18, 28]]
STEPS = 4


def greedy(
    path: Path,
    device: InterpretedDevice,
    register: Callable[[KernelRegistry], None] | None,
    **fields: Any,
) -> tuple[list[list[int]], ExecutorInfo]:
    """One row whole and one in two chunks, beside one another; then both decode."""
    sizes = {"max_rows": 4, "max_context": 64, "page_size": 4, "cache_tokens": 256}
    spec = EngineSpec(str(path), **sizes, **fields)
    executor = TorchExecutor(spec, device, register)
    try:
        info = executor.load()
        driver = Driver(info)
        first, second = PROMPTS
        batches = [
            driver.batch([(0, first[:6])], want=[0]),
            driver.batch([(1, second), (0, first[6:])]),
        ]
        batches += [driver.batch([(1, [LAST_TOKEN]), (0, [LAST_TOKEN])]) for _ in range(STEPS)]
        results = []
        for batch in batches:
            executor.submit(batch)
            results.append(executor.collect().token_ids[:, 0].tolist())
        return results[1:], info
    finally:
        executor.close()


def test_a_model_gives_the_same_tokens(tmp_path: Path) -> None:
    model = Tiny("Llama", {"num_hidden_layers": 2}).model()
    path = save(model, tmp_path)
    want, _ = greedy(path, InterpretedDevice(cpu_facts(features=frozenset())), None)
    device = InterpretedDevice(triton_facts())
    got, info = greedy(path, device, lambda registry: register_triton(registry, device))
    assert got == want
    chosen = {d.what: d.chosen for d in info.decisions}
    on_triton = {what for what, provider in chosen.items() if provider == "triton"}
    assert on_triton >= {
        "kernel attention",
        "kernel rms_norm",
        "kernel add_rms_norm",
        "kernel rope",
        "kernel silu_mul",
        "kernel embedding",
    }


def test_keys_and_values_in_eight_bits_are_served(tmp_path: Path) -> None:
    """Of a random model some token may differ by the rounding; most do not."""
    path = save(Tiny("Llama", {"num_hidden_layers": 2}).model(), tmp_path)
    device = InterpretedDevice(triton_facts())

    def register(registry: KernelRegistry) -> None:
        register_triton(registry, device)

    want, _ = greedy(path, device, register)
    got, info = greedy(path, device, register, kv_dtype="int8")
    chosen = {d.what: d.chosen for d in info.decisions}
    assert chosen["kernel attention"] == "triton"
    assert "int8" in chosen.values()
    same = np.equal(got, want)
    assert same.sum() > same.size // 2
