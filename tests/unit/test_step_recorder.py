"""Guards recorded steps: the same bits as op by op, whatever the number of tokens; buffers that
share memory without harm; and a step that does more than instructions can is not recorded."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from support.kernel_checks import cpu_facts
from support.tiny_models import TINY, save
from support.tiny_torch_model import tiny_executor

from sixfold.platforms.cpu.device import CpuDevice
from sixfold.platforms.cpu.kernels import register
from sixfold.platforms.cpu.native_library import Team, missing
from sixfold.platforms.cpu.native_ops import Issuer, NativeOps, NotRecorded
from sixfold.platforms.cpu.packing import pack_floats, quantise_int8
from sixfold.platforms.cpu.step_recorder import Arena, RecordedStep, StepRecorder
from sixfold.platforms.interface import EngineSpec
from sixfold.platforms.torch_runtime.executor import TorchExecutor

pytestmark = pytest.mark.skipif(missing() is not None, reason="no native kernels here")
MOST = 40


@pytest.fixture
def issuer() -> Issuer:
    return Issuer(Team(2, "portable"))


def chain(ops: NativeOps, depth: int = 5):
    """A step of many buffers that come and go; ids and positions both enter."""
    torch.manual_seed(0)
    width = 32
    table = pack_floats(torch.randn(20, width))
    weights = [quantise_int8(torch.randn(2 * width, width)) for _ in range(depth)]
    back = [pack_floats(torch.randn(width, width) * 0.1) for _ in range(depth)]
    norm, inverse = torch.rand(width) + 0.5, torch.rand(width // 4)

    def step(token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = residual = ops.embedding(token_ids, table)
        cos, sin = ops.rope_angles(positions, inverse, 1.0)
        for wide, narrow in zip(weights, back, strict=True):
            x, residual = ops.add_rms_norm(x, residual, norm, 1e-6)
            gate, up = ops.linear(x, wide).split(width, dim=1)
            q, k = (part.unflatten(1, (2, width // 2)) for part in (gate, up))
            q, k = ops.rope(q, k, cos, sin)
            x = ops.linear(ops.silu_mul(q.flatten(1), k.flatten(1)), narrow)
        return ops.rms_norm(x, norm, 1e-6)

    return step


@torch.inference_mode()
def test_a_recording_gives_the_same_bits_for_any_number_of_tokens(issuer: Issuer) -> None:
    step = chain(NativeOps(issuer))
    recorded = RecordedStep(issuer, step, MOST)
    for count in (1, 2, 7, 33, MOST, 3, 1):
        ids, positions = torch.randint(0, 20, (count,)), torch.randint(0, 500, (count,))
        want = step(ids, positions)
        assert torch.equal(recorded(ids, positions), want)


@torch.inference_mode()
def test_buffers_are_shared_between_layers(issuer: Issuer) -> None:
    ops = NativeOps(issuer)
    few, many = (RecordedStep(issuer, chain(ops, depth), MOST) for depth in (3, 30))
    assert many.buffer_bytes == few.buffer_bytes
    assert many.count > 8 * few.count


def test_a_buffer_returns_only_when_its_last_view_is_gone() -> None:
    arena = Arena()
    first = arena.allocate(4, 8)
    view = first[:, 2:4]
    address = first.data_ptr()
    del first
    gc.collect()
    assert arena.allocate(4, 8).data_ptr() != address
    del view
    gc.collect()
    assert address in {arena.allocate(4, 8).data_ptr() for _ in range(1)}


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (lambda x: x + 1, "add"),
        (lambda x: x.mul_(2), "mul_"),
        (lambda x: x.t().contiguous().t(), "contiguous|clone"),
        (lambda x: x[: int(x[0, 0].item() > 0) + 1], "item|_local_scalar_dense"),
        (lambda x: torch.zeros(3, 3), "zeros"),
    ],
)
@torch.inference_mode()
def test_a_step_that_computes_elsewhere_is_not_recorded(issuer: Issuer, extra, named: str) -> None:
    step = chain(NativeOps(issuer))
    with pytest.raises(NotRecorded, match=named):
        RecordedStep(issuer, lambda ids, positions: extra(step(ids, positions)), MOST)
    x = torch.randn(2, 3)
    assert NativeOps(issuer).silu_mul(x, x).shape == x.shape, "the issuer runs again afterwards"


@torch.inference_mode()
def test_a_step_on_some_of_its_tokens_is_not_recorded(issuer: Issuer) -> None:
    step = chain(NativeOps(issuer))
    with pytest.raises(NotRecorded, match=f"1 rows for {MOST} tokens"):
        RecordedStep(issuer, lambda ids, positions: step(ids[:1], positions[:1]), MOST)


@torch.inference_mode()
def test_a_recording_that_differs_from_its_step_is_an_error(issuer: Issuer) -> None:
    """The step takes other weights each time it runs: no recording can follow."""
    ops, norms = NativeOps(issuer), [torch.ones(32), torch.full((32,), 2.0)]
    table, calls = pack_floats(torch.randn(20, 32)), []

    def step(token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return ops.rms_norm(ops.embedding(token_ids, table), norms[len(calls) % 2], 1e-6)

    ids = torch.tensor([3, 4])
    with pytest.raises(RuntimeError, match="differs"):
        StepRecorder(issuer).record(step, (ids, ids), MOST)


def test_a_model_of_torch_operations_runs_op_by_op_and_says_why() -> None:
    executor = tiny_executor()
    decision = {d.what: d for d in executor.load().decisions}["step"]
    executor.close()
    assert decision.chosen == "op by op"
    assert "the model calls torch's" in decision.because


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3", "qwen3_moe"])
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_every_family_is_recorded(name: str, quantize: str | None, tmp_path: Path) -> None:
    path = save(TINY[name].model(), tmp_path)
    device = CpuDevice(cpu_facts(), threads=1)
    spec = EngineSpec(str(path), dtype="float32", max_context=64, quantize=quantize)
    executor = TorchExecutor(spec, device, lambda registry: register(registry, device))
    decision = {d.what: d for d in executor.load().decisions}["step"]
    executor.close()
    assert decision.chosen == "recorded", decision.because
