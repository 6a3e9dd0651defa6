"""Guards captured steps: a replay gives the bits of the same code uncaptured, and the tokens of
steps run op by op, whatever rows come and go and whatever lay in its buffers before; and work that
a graph cannot hold is refused where it is recorded. The graph is a stand-in on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from support.graph_stand_in import CannotRecord, Recording, StandInGraphs
from support.kernel_checks import cpu_facts
from support.plain_paged import Bound, PlainPaged, Plan
from support.random_source import RandomSource
from support.tiny_experts import DEEPSEEK_V3
from support.tiny_qwen3_5 import TEXT as QWEN3_5
from support.tiny_torch_model import Driver

from sixfold.common.errors import ConfigError
from sixfold.platforms.cpu.device import CpuDevice
from sixfold.platforms.interface import EngineSpec
from sixfold.platforms.interface_step import LAST_TOKEN, StepBatch, StepResult
from sixfold.platforms.torch_runtime.captured_draw import CapturedDraw, DrawPlan
from sixfold.platforms.torch_runtime.executor import TorchExecutor
from sixfold.platforms.torch_runtime.graph_runner import bucket_sizes

CONFIG: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "use_sliding_window": True,
    "sliding_window": 6,
    "max_window_layers": 2,
}
MOE: dict[str, Any] = {
    **CONFIG,
    "model_type": "qwen3_moe",
    "use_sliding_window": False,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
SIZES = {"vocab_size": 97, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
STATES: dict[str, Any] = {**QWEN3_5, **SIZES, "model_type": "qwen3_5_text"}
LATENTS: dict[str, Any] = {
    **DEEPSEEK_V3,
    **SIZES,
    "model_type": "deepseek_v3",
    "rope_theta": 1e4,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 2,
}
PAGE, ROWS = 4, 12


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class GraphDevice(CpuDevice):
    def __init__(self, stand_in: StandInGraphs | None) -> None:
        super().__init__(cpu_facts(), threads=1)
        self.stand_in = stand_in

    @property
    def graphs(self) -> Any:
        return self.stand_in


def executor(
    stand_in: StandInGraphs | None,
    backend: type[PlainPaged] | None = PlainPaged,
    config: dict[str, Any] = CONFIG,
    **fields: Any,
) -> TorchExecutor:
    device = GraphDevice(stand_in)
    spec = EngineSpec(
        "",
        dtype="float32",
        max_rows=ROWS,
        page_size=PAGE,
        cache_tokens=320,
        max_context=32,
        **fields,
    )

    def register(registry: Any) -> None:
        if backend is not None:
            registry.add_attention(backend(device), priority=5)

    return TorchExecutor(spec, device, register, lambda _: RandomSource(config))


def decided(made: TorchExecutor) -> Any:
    return {d.what: d for d in made.load().decisions}["step"]


MIXED: list[dict[str, Any]] = [
    {"temperature": 0.0, "logprobs": 3},
    {"temperature": 0.8, "uniform": 0.3},
]
DRAWN: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.9, "uniform": 0.7},
    {"temperature": 0.7, "top_k": 5, "uniform": 0.2},
    {"temperature": 1.3, "top_p": 0.6, "min_p": 0.02, "uniform": 0.9},
]


def traffic(driver: Driver, steps: int, seed: int = 3) -> Iterator[StepBatch]:
    """Rows begin with a prompt, decode, and end; a new row takes over handle and pages. Prompts
    are steps of their own; the others have between one and all rows, in any order."""
    rng = np.random.default_rng(seed)
    alive: dict[int, int] = {}
    for step in range(steps):
        if len(alive) < ROWS and step % 3 == 0:
            handle = min(set(range(ROWS)) - alive.keys())
            alive[handle] = 0
            prompt = rng.integers(1, 97, rng.integers(1, 9)).tolist()
            params = [{"temperature": 0.0, "logprobs": 3}]
            yield driver.batch([(handle, prompt)], params=params)
        chosen = rng.permutation(sorted(alive))[: int(rng.integers(1, len(alive) + 1))]
        kinds = MIXED if step % 2 else DRAWN
        params = [kinds[int(row) % len(kinds)] for row in chosen]
        yield driver.batch([(int(row), [LAST_TOKEN]) for row in chosen], params=params)
        for handle in list(alive):
            alive[handle] += 1
            if alive[handle] > 9 + handle % 3:
                del alive[handle]
                release(driver, handle)


def release(driver: Driver, handle: int) -> None:
    """The row ends; its pages go to whoever comes next, with what is in them."""
    for name, table in driver.tables.items():
        driver.free[name] += [int(page) for page in table[handle] if page]
        table[handle] = 0
    driver.lengths[handle] = 0


def serve(made: TorchExecutor, stand_in: StandInGraphs | None, steps: int = 26) -> list[StepResult]:
    """The traffic's results; before each step everything between steps is poisoned, and the null
    page with it."""
    driver = Driver(made.load(), seed=1)
    results = []
    for batch in traffic(driver, steps):
        if stand_in is not None:
            stand_in.poison()
            for pool in made.pools.values():
                for data in pool.data if isinstance(pool.data, list) else [pool.data]:
                    data[:, 0] = torch.nan
        made.submit(batch)
        results.append(made.collect())
    made.close()
    return results


def test_replays_equal_the_same_code_uncaptured_and_steps_run_op_by_op() -> None:
    captured, uncaptured = StandInGraphs(), StandInGraphs(captures=False)
    replayed, direct = (serve(executor(s), s) for s in (captured, uncaptured))
    plain = serve(executor(None), None)
    assert len(captured.recordings) == 3 * len(bucket_sizes(ROWS)) == 15  # a step, two draws
    compared = 0
    for got, same, free in zip(replayed, direct, plain, strict=True):
        np.testing.assert_array_equal(got.token_ids, same.token_ids)
        np.testing.assert_array_equal(got.token_ids, free.token_ids)
        if got.logprobs is None or same.logprobs is None or free.logprobs is None:
            continue
        np.testing.assert_array_equal(got.logprobs, same.logprobs)
        np.testing.assert_allclose(got.logprobs, free.logprobs, atol=1e-5)
        compared += int(np.isfinite(got.logprobs).sum())
    assert compared > 15


@pytest.mark.parametrize("config", [STATES, LATENTS], ids=lambda c: c["model_type"])
def test_generic_kernels_of_states_and_latents_are_captured(config: dict[str, Any]) -> None:
    """They read lengths on the host for longer rows only, which no recording has."""
    stand_in = StandInGraphs()
    replayed = serve(executor(stand_in, config=config), stand_in, 12)
    plain = serve(executor(None, config=config), None, 12)
    assert len(stand_in.recordings) == 15
    for got, free in zip(replayed, plain, strict=True):
        np.testing.assert_array_equal(got.token_ids, free.token_ids)


def test_filtered_sampling_is_drawn_inside_the_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the traffic's steps of decoding rows those with log-probabilities alone are not."""
    used: list[bool] = []
    run = CapturedDraw.run

    def counted(self: CapturedDraw, plan: DrawPlan, hidden: torch.Tensor) -> torch.Tensor:
        used.append(plan.filtered)
        return run(self, plan, hidden)

    monkeypatch.setattr(CapturedDraw, "run", counted)
    stand_in = StandInGraphs()
    replayed = serve(executor(stand_in), stand_in)
    assert 8 < len(used) < len(replayed)
    assert set(used) == {False, True}
    for got, free in zip(replayed, serve(executor(None), None), strict=True):
        np.testing.assert_array_equal(got.token_ids, free.token_ids)


def test_a_step_takes_the_smallest_bucket_that_holds_it() -> None:
    stand_in = StandInGraphs()
    made = executor(stand_in)
    driver = Driver(made.load())
    runner = stand_in.runner
    assert runner is not None
    for rows, bucket in ((1, 1), (2, 2), (3, 4), (5, 8), (8, 8), (9, 12), (12, 12)):
        found = runner.bucket_of(driver.batch([(row, [5]) for row in range(rows)]))
        assert found is not None
        assert found.rows == bucket
    assert runner.bucket_of(driver.batch([(0, [5]), (1, [5, 6])])) is None
    made.close()


@pytest.mark.parametrize("most", [1, 2, 3, 8, 9, 64, 100, 256, 1000])
def test_buckets_rise_to_the_most_rows_and_pad_little(most: int) -> None:
    sizes = bucket_sizes(most)
    assert sizes[-1] == most
    assert sizes == sorted(set(sizes))
    assert sizes[0] == 1
    for small, large in pairwise(sizes):
        assert large - small <= max(8, small // 4)


def test_large_buckets_are_captured_first_and_each_is_told() -> None:
    told: list[tuple[int, int, str]] = []
    stand_in = StandInGraphs()
    made = executor(stand_in)

    def progress(done: int, total: int, stage: str = "") -> None:
        told.append((done, total, stage))

    decision = {d.what: d for d in made.load(progress).decisions}["step"]
    made.close()
    counted = [(done, total) for done, total, stage in told if stage == "capturing decode steps"]
    assert counted == [(n, 5) for n in range(1, 6)]
    steps = stand_in.recordings[::3]
    assert [len(recording.result) for recording in steps] == [12, 8, 4, 2, 1]
    assert decision.chosen == "captured"
    assert "1, 2, 4, 8, 12 rows" in decision.because


# ---- what the user asks for


def test_off_is_honoured() -> None:
    stand_in = StandInGraphs()
    made = executor(stand_in, graphs="off")
    assert (decided(made).chosen, decided(made).because) == ("op by op", "set by the user")
    made.close()
    assert not stand_in.recordings


@pytest.mark.parametrize(
    ("stand_in", "backend", "config", "reason"),
    [
        (None, PlainPaged, CONFIG, "this device captures nothing"),
        (StandInGraphs(), None, CONFIG, "gathers as many pages as the rows of a step have"),
        (StandInGraphs(), PlainPaged, MOE, "kernels that read on the host: moe=generic"),
    ],
)
def test_on_is_honoured_or_refused_and_unasked_the_reason_is_recorded(
    stand_in: Any, backend: Any, config: dict[str, Any], reason: str
) -> None:
    made = executor(stand_in, backend, config)
    decision = decided(made)
    made.close()
    assert decision.chosen == "op by op"
    assert reason in decision.because
    assert decision.rejected == (("captured", decision.because),)
    made = executor(stand_in, backend, config, graphs="on")
    with pytest.raises(ConfigError, match=reason):
        made.load()
    made.close()


# ---- faults


class PlansInRun(PlainPaged):
    def bind(self, plan: Plan, reserved: Bound | None = None) -> Any:
        return plan

    def run(self, bound: Any, *args: Any, **kwargs: Any) -> Any:
        return super().run(PlainPaged.bind(self, bound), *args, **kwargs)


class ReadsBack(PlainPaged):
    def run(self, bound: Bound, pool: Any, layer: int, q: Any, *rest: Any) -> Any:
        most = int(bound.positions.max())
        return super().run(bound, pool, layer, q * (most >= 0), *rest)


class ReadsByCpu(PlainPaged):
    def run(self, bound: Bound, pool: Any, layer: int, q: Any, *rest: Any) -> Any:
        return super().run(bound, pool, layer, q + bound.positions.cpu().sum() * 0, *rest)


class SizedByValues(PlainPaged):
    def run(self, bound: Bound, pool: Any, layer: int, q: Any, *rest: Any) -> Any:
        active = torch.nonzero(bound.slots)
        return super().run(bound, pool, layer, q + 0 * len(active), *rest)


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        (PlansInRun, "makes a device tensor from host values"),
        (ReadsBack, "reads a device value on the host"),
        (ReadsByCpu, "reads a device value on the host: Tensor.cpu"),
        (SizedByValues, "a tensor whose size depends on values: nonzero"),
    ],
)
def test_a_backend_that_a_graph_cannot_hold_is_refused(backend: Any, message: str) -> None:
    made = executor(StandInGraphs(), backend)
    with pytest.raises(CannotRecord, match=message):
        made.load()
    made.close()


class FreshBuffers(PlainPaged):
    """Leaves the reserved buffers alone: a recording never sees a plan after the first."""

    def bind(self, plan: Plan, reserved: Bound | None = None) -> Bound:
        return super().bind(plan, None)


class BakesContext(PlainPaged):
    """Takes a number of the plan into `run`: the first plan's is repeated for ever."""

    def bind(self, plan: Plan, reserved: Bound | None = None) -> Bound:
        self.most = int(plan.positions.max())
        return super().bind(plan, reserved)

    def run(self, bound: Bound, pool: Any, layer: int, q: Any, *rest: Any) -> Any:
        return super().run(bound, pool, layer, q * (1 + self.most), *rest)


class LeavesPadding(PlainPaged):
    """Writes what the plan has and not the rows that the buffers have too many."""

    def bind(self, plan: Plan, reserved: Bound | None = None) -> Bound:
        if reserved is None:
            return super().bind(plan)
        made = super().bind(plan)
        for name in ("table", "slots", "row_of", "positions"):
            source, target = getattr(made, name), getattr(reserved, name)
            target[tuple(slice(0, size) for size in source.shape)] = source
        return reserved


def tokens(made: TorchExecutor, stand_in: StandInGraphs | None) -> list[Any]:
    return [result.token_ids.tolist() for result in serve(made, stand_in, 12)]


@pytest.mark.parametrize("backend", [FreshBuffers, BakesContext, LeavesPadding])
def test_a_backend_whose_replay_differs_is_caught(backend: Any) -> None:
    stand_in = StandInGraphs()
    want = tokens(executor(None), None)
    try:
        got = tokens(executor(stand_in, backend), stand_in)
    except (IndexError, RuntimeError):
        return  # poison where a page or a row should be
    assert got != want


def test_a_recording_that_differs_from_its_work_stops_the_load() -> None:
    class Forgets(StandInGraphs):
        def record(self, work: Any) -> Any:
            recording = Recording(work)
            return lambda: recording() * 2

    made = executor(Forgets())
    with pytest.raises(RuntimeError, match=r"of 12 rows differs .* --graphs off"):
        made.load()
    made.close()
