"""Guards captured steps of the npu platform over the emulator of torch_npu's graphs: a replay gives
what the step itself gives, with the lengths of its own plan, whatever lay in its buffers; and a
host argument of another step, or a call that the pages do not show, is noticed. Evidence of the
kind "emulated"."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.emulated_npu import NPUError, module
from support.emulated_npu.platform import EmulatedDevice, facts
from support.graph_stand_in import poison, poison_results, tensors_of
from support.random_source import RandomSource
from support.tiny_torch_model import Driver

from sixfold.common.errors import ConfigError, KernelError
from sixfold.platforms.interface import EngineSpec
from sixfold.platforms.interface_kv import KVGroup, KVKind
from sixfold.platforms.interface_step import LAST_TOKEN, StepBatch
from sixfold.platforms.npu import graphs
from sixfold.platforms.npu.attention import FusedInferAttention
from sixfold.platforms.npu.graphs import TaskGraphs, unique_slots
from sixfold.platforms.npu.kernels import register
from sixfold.platforms.torch_runtime.executor import TorchExecutor
from sixfold.platforms.torch_runtime.graph_runner import bucket_sizes

ROWS = 5
CONFIG: dict[str, Any] = {
    "model_type": "qwen3", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 40,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "use_sliding_window": True, "sliding_window": 130, "max_window_layers": 2,
}  # fmt: skip
MOE = {
    **CONFIG, "model_type": "qwen3_moe", "use_sliding_window": False, "num_hidden_layers": 2,
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
}  # fmt: skip


class Kept(TaskGraphs):
    """Whose recordings a test can reach."""

    def __init__(self, device: Any) -> None:
        super().__init__(device)
        self.made: list[Any] = []
        self.runner: Any = None
        true = self._npu.NPUGraph
        self._library.NPUGraph = lambda: self.made.append(true()) or self.made[-1]

    def capture(self, *args: Any) -> Any:
        self.runner, decision = super().capture(*args)
        return self.runner, decision

    @torch.inference_mode()
    def poison(self) -> None:
        for graph in self.made:
            poison_results(graph.tasks)
        for bucket in self.runner.buckets:
            for tensor in [bucket.inputs, *tensors_of(bucket.reserved)]:
                poison(tensor)
            for bound in bucket.reserved:
                for part in getattr(bound, "parts", ()):
                    part.keys[:] = [77] * len(part.keys)


class Device(EmulatedDevice):
    def __init__(self, kind: type[TaskGraphs] | None, **changes: Any) -> None:
        super().__init__(replace(facts(), **changes))
        self.kept = None if kind is None else kind(self)

    @property
    def graphs(self) -> Any:
        return self.kept


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> Any:
    torch.set_num_threads(1)
    emulator = module()
    monkeypatch.setitem(sys.modules, "torch_npu", emulator)
    return emulator


def executor(device: Device, config: dict[str, Any] = CONFIG, **fields: Any) -> TorchExecutor:
    spec = EngineSpec(
        "", dtype="float16", max_rows=ROWS, cache_tokens=4096, max_context=384, **fields
    )
    return TorchExecutor(
        spec, device, lambda r: register(r, device), lambda _: RandomSource(config)
    )


def traffic(driver: Driver, steps: int) -> Iterator[StepBatch]:
    """Prompts that end before, at and behind the edge of a page; then between one and all rows
    decode, in any order, over that edge and beyond the window."""
    rng = np.random.default_rng(3)
    params = [{"temperature": 0.0, "logprobs": 2}]
    for row, length in enumerate((3, 126, 127, 128, 140)):
        yield driver.batch([(row, rng.integers(1, 97, length).tolist())], params=params)
    for _ in range(steps):
        chosen = rng.permutation(ROWS)[: int(rng.integers(1, ROWS + 1))]
        yield driver.batch(
            [(int(row), [LAST_TOKEN]) for row in chosen], params=params * len(chosen)
        )


def serve(made: TorchExecutor, device: Device, steps: int = 12) -> list[Any]:
    driver = Driver(made.load(), seed=1)
    results = []
    for batch in traffic(driver, steps):
        if isinstance(device.kept, Kept):
            device.kept.poison()
            for pool in made.pools.values():
                pool.data[:, 0] = torch.nan  # the null page
        made.submit(batch)
        results.append(made.collect())
    made.close()
    return results


def test_replays_equal_steps_run_op_by_op() -> None:
    device, plain = Device(Kept), Device(None)
    got, want = serve(executor(device), device), serve(executor(plain), plain)
    assert device.kept is not None
    assert len(bucket_sizes(ROWS)) == 4
    assert len(device.kept.made) == 3 * 4  # the step, and drawing behind it in two ways
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=2e-2)


def test_experts_of_the_library_are_captured() -> None:
    device, plain = Device(Kept), Device(None)
    got = serve(executor(device, MOE), device, 4)
    for one, other in zip(got, serve(executor(plain, MOE), plain, 4), strict=True):
        np.testing.assert_array_equal(one.token_ids, other.token_ids)


# ---- faults


class Stale(Kept):
    """Updates every task with the lengths that were recorded."""

    def record(self, work: Any) -> Any:
        replay = super().record(work)
        for task in self.tasks_of(replay):
            kept = task.arguments()
            object.__setattr__(task, "arguments", lambda kept=kept: kept)
        return replay

    def tasks_of(self, replay: Any) -> list[graphs.Task]:
        (recorded,) = [
            cell.cell_contents
            for cell in replay.__closure__
            if isinstance(cell.cell_contents, graphs.Recorded)
        ]
        return recorded.tasks


def test_a_stale_host_argument_is_caught() -> None:
    device, plain = Device(Stale), Device(None)
    want = serve(executor(plain), plain)
    got = serve(executor(device), device)
    assert [r.token_ids.tolist() for r in got] != [r.token_ids.tolist() for r in want]


class Forgets(Kept):
    def _update(self, recorded: Any) -> None:
        return


class ForgetsTheLast(Stale):
    def record(self, work: Any) -> Any:
        replay = super().record(work)
        self.tasks_of(replay)[-1:] = []
        return replay


class DoesNotWait(Kept):
    def _update(self, recorded: Any) -> None:
        self._updates = self._updates or self._npu.Stream()
        self._updates.wait_stream = lambda stream: None
        super()._update(recorded)


class Twice(Stale):
    def record(self, work: Any) -> Any:
        replay = super().record(work)
        task = self.tasks_of(replay)[0]

        def call(**given: Any) -> None:
            task_call(**given)
            task_call(**given)

        task_call = task.call
        object.__setattr__(task, "call", call)
        return replay


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Forgets, "nobody records it: the stream stands"),
        (DoesNotWait, "a replay may still run the task"),
        (Twice, "the tasks were "),
    ],
)
def test_an_update_that_is_not_as_documented_is_refused(kind: type[Kept], message: str) -> None:
    device = Device(kind)
    made = executor(device)
    with pytest.raises(NPUError, match=message):
        serve(made, device)
    made.close()


def test_a_layer_that_is_not_updated_is_caught() -> None:
    device, plain = Device(ForgetsTheLast), Device(None)
    want = serve(executor(plain), plain)
    got = serve(executor(device), device)
    assert [r.token_ids.tolist() for r in got] != [r.token_ids.tolist() for r in want]


def test_a_call_that_keeps_its_lengths_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def plain(query: Any, arguments: Callable[[], dict[str, Any]]) -> Any:
        return sys.modules["torch_npu"].npu_fused_infer_attention_score(**arguments())[0]  # type: ignore[attr-defined]

    monkeypatch.setattr("sixfold.platforms.npu.attention._recordable", plain)
    made = executor(Device(Kept))
    with pytest.raises(NPUError, match="a capture keeps its lengths"):
        made.load()
    made.close()


# ---- what is not captured, and why


def test_a_driver_that_updates_no_tasks_is_named() -> None:
    old = {"libraries": {**facts().libraries, "driver": "24.1.rc3"}}
    made = executor(Device(Kept, **old))
    decision = {d.what: d for d in made.load().decisions}["step"]
    made.close()
    assert decision.chosen == "op by op"
    assert "the driver 24.1.rc3 updates no recorded tasks" in decision.because
    made = executor(Device(Kept, **old), graphs="on")
    with pytest.raises(ConfigError, match=r"25\.0 and later do"):
        made.load()
    made.close()


def test_more_rows_than_the_null_page_can_pad_are_refused() -> None:
    backend = FusedInferAttention(Device(None))
    group = KVGroup("g", KVKind.FULL, 128, 3)
    assert len(backend.reserve(group, 384, 384, 200).slots) == 384
    with pytest.raises(KernelError, match="up to 384 rows are captured with such a cache, not 400"):
        backend.reserve(group, 400, 400, 200)
    with pytest.raises(KernelError, match="one token a row"):
        backend.reserve(group, 2, 4, 200)


def test_padding_writes_places_of_its_own() -> None:
    slots = unique_slots(np.array([300, 0, 0, 700, 0]), 128)
    assert slots.tolist() == [300, 0, 1, 700, 2]
    many = unique_slots(np.zeros(300, np.int64), 128)
    assert len(set(many.tolist())) == 300
    assert not ((many // 128) % 2).any()  # blocks of keys
