"""Guards DeepSeek-V4 in captured steps: a decode step replayed in a bucket with rows to spare, its
buffers, null pages and free slots poisoned, gives the tokens of steps run op by op. The graph is a
stand-in on the CPU, and the experts' kernel one that reads nothing on the host."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.graph_stand_in import StandInGraphs
from support.kernel_checks import cpu_facts
from support.tiny_deepseek_v4 import CONFIG, tensors, write
from support.tiny_torch_model import Driver
from torch import Tensor

from sixfold.platforms.cpu.device import CpuDevice
from sixfold.platforms.interface import EngineSpec
from sixfold.platforms.interface_kernels import Kernel
from sixfold.platforms.interface_step import LAST_TOKEN, StepBatch
from sixfold.platforms.torch_runtime.activations import clamped_swiglu
from sixfold.platforms.torch_runtime.executor import TorchExecutor
from sixfold.platforms.torch_runtime.step_caches import SlotsPart

ROWS = 5
# One layer of each kind that has entries; few Sinkhorn steps make short recordings.
FEWER = {"num_hidden_layers": 2, "compress_ratios": [128, 4, 0], "hc_sinkhorn_iters": 2}
GREEDY = {"temperature": 0.0, "logprobs": 1}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {**CONFIG, **FEWER}
    return write(tmp_path_factory.mktemp("deepseek_v4"), tensors(config), config)


def every_expert(
    x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, limit: float
) -> Tensor:
    """All experts of all rows, most of them at weight 0: no sizes that depend on values."""
    share = torch.zeros(len(x), len(gate_up)).scatter_add(1, experts, weights)
    gate, up = (x @ gate_up.mT).chunk(2, dim=-1)
    made = clamped_swiglu(gate, up, limit, 1.0, 0.0) @ down.mT
    return (made * share.T.unsqueeze(-1)).sum(dim=0)


class GraphDevice(CpuDevice):
    def __init__(self, stand_in: StandInGraphs | None) -> None:
        super().__init__(cpu_facts(), threads=1)
        self.stand_in = stand_in

    @property
    def graphs(self) -> Any:
        return self.stand_in


def executor(path: Path, stand_in: StandInGraphs | None, own_experts: bool = True) -> TorchExecutor:
    spec = EngineSpec(
        str(path), dtype="float32", max_rows=ROWS, page_size=4, cache_tokens=320, max_context=64
    )
    kernel = Kernel("moe_experts", "test", lambda facts, problem: None, every_expert, priority=1)

    def register(registry: Any) -> None:
        if own_experts:
            registry.add(kernel)

    return TorchExecutor(spec, GraphDevice(stand_in), register)


def traffic(driver: Driver) -> Iterator[StepBatch]:
    """Prompts join one by one; in between some of the rows decode, in any order."""
    rng = np.random.default_rng(3)
    for step in range(20):
        if step < 4 * ROWS and step % 4 == 0:
            prompt = rng.integers(2, 256, rng.integers(1, 25)).tolist()
            yield driver.batch([(step // 4, prompt)], params=[GREEDY])
        rows = rng.permutation(step // 4 + 1)[: int(rng.integers(1, step // 4 + 2))]
        yield driver.batch([(int(r), [LAST_TOKEN]) for r in rows], params=[GREEDY] * len(rows))


def serve(made: TorchExecutor, stand_in: StandInGraphs | None = None) -> list[Any]:
    driver, results = Driver(made.load(), seed=1), []
    for batch in traffic(driver):
        if stand_in is not None:
            stand_in.poison()
            for pool in made.pools.values():
                for data in pool.data if isinstance(pool.data, list) else [pool.data]:
                    data[:, 0] = torch.nan
        made.submit(batch)
        results.append(made.collect())
    made.close()
    return results


def test_replays_give_the_tokens_of_steps_run_op_by_op(path: Path) -> None:
    stand_in = StandInGraphs()
    captured = executor(path, stand_in)
    found, expected = serve(captured, stand_in), serve(executor(path, None))
    assert len(stand_in.recordings) == 3 * 4  # a step and two draws of 1, 2, 4 and 5 rows
    for ours, plain in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours.token_ids, plain.token_ids)
        np.testing.assert_allclose(ours.logprobs, plain.logprobs, atol=1e-4)


def test_experts_that_read_on_the_host_are_the_reason_not_to_capture(path: Path) -> None:
    made = executor(path, StandInGraphs(), own_experts=False)
    step = {d.what: d for d in made.load().decisions}["step"]
    made.close()
    assert "moe_experts=generic" in str(step)
    assert "compressed_attention" not in str(step)


def test_padding_that_writes_to_a_rows_state_shows(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, stand_in = serve(executor(path, None)), StandInGraphs(captures=False)
    real = SlotsPart.bind

    def with_a_slot(self: SlotsPart, plan: Any, reserved: Any = None) -> Tensor:
        slots = real(self, plan, reserved)
        return slots.copy_(torch.where(slots < 0, slots[:1], slots))

    monkeypatch.setattr(SlotsPart, "bind", with_a_slot)
    found = serve(executor(path, stand_in))
    assert any(
        not np.allclose(ours.logprobs, plain.logprobs, atol=1e-4)
        for ours, plain in zip(found, expected, strict=True)
    )
