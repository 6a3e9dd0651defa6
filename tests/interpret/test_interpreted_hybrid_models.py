"""Guards the whole for models with states and compressed caches: tiny Qwen3.5 and DeepSeek-V4 on
the Triton kernels in the interpreter give the tokens that they give on the generic kernels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support import tiny_deepseek_v4, tiny_qwen3_5
from support.kernel_checks import cpu_facts
from support.run_engine import complete, serving
from support.triton_checks import WARP_64, InterpretedDevice

from sixfold.common.ops.registry import KernelRegistry
from sixfold.common.sampling import SamplingParams
from sixfold.platforms.interface import EngineSpec
from sixfold.platforms.interface_attention import AttentionBackend
from sixfold.platforms.interface_kernels import Kernel
from sixfold.platforms.torch_runtime.executor import TorchExecutor
from sixfold.platforms.triton_kernels.register import register_triton

PROMPTS = [list(range(3, 13)), [7, 9]]
GREEDY = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)


def deepseek_v4(path: Path) -> Path:
    """A layer with all entries and one with selected ones."""
    small = {"num_hidden_layers": 2, "compress_ratios": [128, 4, 0], "compress_rate_hca": 8}
    few = {"index_topk": 1, "hc_mult": 2, "hc_sinkhorn_iters": 2}
    config = {**tiny_deepseek_v4.CONFIG, **small, **few}
    return tiny_deepseek_v4.write(path, tiny_deepseek_v4.tensors(config), config)


def qwen3_5(path: Path) -> Path:
    layers = {"num_hidden_layers": 2, "full_attention_interval": 2}
    return tiny_qwen3_5.write(path, "dense", **layers)[0]


class Some:
    """A registry that takes the kernels of some ops, and no attention backend."""

    def __init__(self, registry: KernelRegistry, ops: set[str]) -> None:
        self.registry, self.ops = registry, ops

    def add_attention(self, backend: AttentionBackend, priority: int) -> None:
        return

    def add(self, kernel: Kernel) -> None:
        if kernel.op in self.ops:
            self.registry.add(kernel)


def tokens(
    path: Path, device: InterpretedDevice, register: Callable[[KernelRegistry], None] | None
) -> tuple[list[list[int]], set[str]]:
    """Of both prompts, one of them in chunks, and the ops that Triton's kernels are chosen for."""
    steps = {"max_rows": 4, "max_context": 64, "page_size": 16, "max_step_tokens": 7}
    spec = EngineSpec(str(path), cache_tokens=256, **steps)  # type: ignore[arg-type]
    with serving(TorchExecutor(spec, device, register)) as (engine, info):
        chosen = {d.what.removeprefix("kernel ") for d in info.decisions if d.chosen == "triton"}
        return complete(engine, PROMPTS, GREEDY), chosen


@pytest.mark.parametrize(
    ("make", "ops"),
    [
        (qwen3_5, {"gated_delta", "conv1d_update"}),
        (
            deepseek_v4,
            {"mhc_pre", "mhc_post_pre", "mhc_post", "mhc_head", "compress_norm_rope_store"}
            | {"index_topk", "compressed_attention"},
        ),
    ],
    ids=["qwen3_5", "deepseek_v4"],
)
def test_a_model_gives_the_same_tokens(
    make: Callable[[Path], Path], ops: set[str], tmp_path: Path
) -> None:
    path = make(tmp_path)
    want, _ = tokens(path, InterpretedDevice(cpu_facts(features=frozenset())), None)
    device = InterpretedDevice(WARP_64)
    # What every model has is tested with Llama; experts take long in the interpreter.
    got, chosen = tokens(path, device, lambda r: register_triton(Some(r, ops), device))  # type: ignore[arg-type]
    assert got == want
    assert chosen >= ops
