"""Guards every model on devices that are not here: traced on fake tensors of the device through
prefill, decode and mixed steps, all is on the device and nothing is read back in the forward; the
same in the buckets that a device graph captures. Evidence of the kind "traced": no values.

While tracing, Triton's wrappers are the real ones, their launches recorded; kernels of libraries
compute as the generic kernel of their op, their attention is a shape function
(`support/fake_device.py`). Selection, plans and buffers are the platform's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from support.fake_device import FakeExecutor, HostRead, Opaque
from support.graph_stand_in import StandInGraphs
from support.image_mock import PAD
from support.library_stand_ins import install
from support.random_source import RandomSource
from support.recorded_launches import Launch, record_launches
from support.recorded_machines import load
from support.seeing_model import CONFIG as SEEING
from support.seeing_model import FAMILY, MERGE, VALUES, SeeingModel
from support.tiny_torch_model import Driver
from support.traced_models import FAMILIES, MIXTURES, config, steps
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from sixfold.common.images.positions import rotary_positions
from sixfold.models.loading import FAMILIES as FAMILIES_KNOWN
from sixfold.platforms import select
from sixfold.platforms.cuda.device import CUDADevice
from sixfold.platforms.cuda.kernels import register as register_cuda
from sixfold.platforms.interface import EngineSpec
from sixfold.platforms.interface_step import LAST_TOKEN, StepImage
from sixfold.platforms.rocm.device import ROCmDevice
from sixfold.platforms.rocm.kernels import register as register_rocm
from sixfold.platforms.xpu.device import XPUDevice
from sixfold.platforms.xpu.kernels import register as register_xpu

pytest.importorskip("triton")

OPAQUE = frozenset({"flashinfer", "aiter"})


@dataclass(frozen=True)
class Target:
    """A platform on a recorded machine, with libraries that the record may not have."""

    platform: str
    machine: str
    libraries: dict[str, str]
    device: str = "cuda:0"  # as torch spells it

    def __str__(self) -> str:
        return "-".join([self.machine, *self.libraries])

    def executor(
        self, config: dict[str, Any], records: bool = False, **fields: Any
    ) -> FakeExecutor:
        """`records`: the device has graphs, whose buckets run uncaptured."""
        facts = select.probe_all(load(self.machine)[0])[self.platform].devices[0]
        facts = replace(facts, libraries={**facts.libraries, **self.libraries})
        device, register = self._parts(facts)
        spec = EngineSpec("", max_rows=8, page_size=16, cache_tokens=512, max_context=64, **fields)
        stand_in = StandInGraphs(captures=False, device=self.device) if records else None
        return FakeExecutor(device, register, RandomSource(config), spec, stand_in)

    def _parts(self, facts: Any) -> tuple[Any, Callable[[Any], None]]:
        make, register = PARTS[self.platform]
        device = make(facts, self.device)

        def opaque(registry: Any) -> None:
            register(Opaque(registry, OPAQUE), device)

        return device, opaque


class Valueless(XPUDevice):
    """Over fake tensors, which have no numbers to check attention by."""

    checks_attention = False


PARTS: dict[str, tuple[Any, Any]] = {
    "cuda": (CUDADevice, register_cuda),
    "rocm": (ROCmDevice, register_rocm),
    "xpu": (Valueless, register_xpu),
}
"""Platform -> its device and what it registers."""

TARGETS = (
    Target("cuda", "nvidia_h100", {}),
    Target("cuda", "nvidia_b200", {"flashinfer-python": "0.7.2.post1"}),
    Target("rocm", "amd_mi300x", {}),
    Target("rocm", "amd_mi355x", {"amd-aiter": "0.1.7"}),
    Target("xpu", "intel_arc_b580", {}, "xpu:0"),
)
"""Between them: attention by Triton, FlashInfer and aiter."""
OTHER_CARDS = (TARGETS[1], TARGETS[3], TARGETS[4])


def wide(target: Target) -> Any:
    return pytest.param(target, marks=pytest.mark.wide)


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """What Triton's wrappers launch. Libraries are stand-ins."""
    install(monkeypatch)
    return record_launches(monkeypatch)


@pytest.mark.parametrize("target", [TARGETS[0], TARGETS[2], *map(wide, OTHER_CARDS)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_model_stays_on_the_device_and_its_decode_steps_can_be_recorded(
    target: Target, family: str, launches: list[Launch]
) -> None:
    made = target.executor(config(family), records=True)
    assert steps(made) == 4
    devices = {p.device for p in [*made.model.parameters(), *made.model.buffers()]}
    assert devices == {torch.device(target.device)}
    decisions = {d.what: d for d in made.info.decisions}
    assert decisions["dtype"].chosen == "bfloat16"
    assert decisions["step"].chosen == "in buckets", decisions["step"]
    assert made.record() == 4  # buckets of 1, 2, 4 and 8 rows
    assert launches
    assert ("expert_kernel" in {name for name, *_ in launches}) is (family in MIXTURES)


@pytest.mark.parametrize("target", [TARGETS[0], TARGETS[2]], ids=str)
def test_graphs_off_runs_every_step_op_by_op(target: Target) -> None:
    made = target.executor(config("llama"), records=True, graphs="off")
    decision = {d.what: d for d in made.info.decisions}["step"]
    assert (decision.chosen, decision.because) == ("op by op", "set by the user")
    assert steps(made) == 4
    assert made.buckets == []


@pytest.mark.parametrize("target", [TARGETS[0], TARGETS[2]], ids=str)
def test_eight_bit_weights_stay_on_the_device(target: Target) -> None:
    made = target.executor(config("llama"), quantize="fp8")
    chosen = {d.what: d.chosen for d in made.info.decisions}
    assert (chosen["weights"], chosen["kernel linear"]) == ("fp8", "scaled_mm")
    assert steps(made) == 4


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_a_model_that_sees_stays_on_the_device(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven tokens, four of them an image's; then the row decodes."""
    monkeypatch.setitem(FAMILIES_KNOWN, FAMILY, SeeingModel)
    made = target.executor({**SEEING, "head_dim": 64})
    driver = Driver(made.info)
    grid = (1, 4, 4)
    image = StepImage(0, grid, np.zeros((16, VALUES), np.float32), first=0, token=2, count=4)
    places, shift = rotary_positions(7, [(2, grid)], MERGE)
    first = driver.batch([(0, [1, 2, *[PAD] * 4, 3])])
    made.run(replace(first, images=(image,), images_done=(0,), rotary=places))
    after = driver.batch([(0, [LAST_TOKEN])])
    made.run(replace(after, rotary=np.full((3, 1), 7 + shift, np.int32)))
    assert {b.device for b in made.model.vision.buffers()} == {torch.device(target.device)}


# ---- faults


def _host_tensor(x: torch.Tensor) -> torch.Tensor:
    return x + torch.ones(x.shape[-1])


def _reads_item(x: torch.Tensor) -> torch.Tensor:
    return x * float(x.abs().max().item() >= 0)


def _reads_cpu(x: torch.Tensor) -> torch.Tensor:
    return x + x.cpu().sum().to(x.device)


def _moves(x: torch.Tensor) -> torch.Tensor:
    return x.to("cpu", torch.float32).to(x.device, x.dtype)


def _host_index(x: torch.Tensor) -> torch.Tensor:
    return x.index_select(0, torch.arange(len(x)))


def _size_from_values(x: torch.Tensor) -> torch.Tensor:
    return x + torch.nonzero(x)[:1, :1]


FAULTS: list[tuple[Callable[[torch.Tensor], torch.Tensor], Any, str]] = [
    (_host_tensor, RuntimeError, "at least two devices"),
    (_host_index, RuntimeError, "at least two devices"),
    (_reads_item, HostRead, "Tensor.item"),
    (_reads_cpu, HostRead, "Tensor.cpu"),
    (_moves, HostRead, "moves a tensor from cuda:0 to cpu"),
    (_size_from_values, DynamicOutputShapeException, "nonzero"),
]


@pytest.mark.parametrize(
    ("fault", "error", "text"), FAULTS, ids=[fault.__name__ for fault, _, _ in FAULTS]
)
def test_a_fault_in_the_forward_is_caught(fault: Any, error: Any, text: str) -> None:
    made = TARGETS[0].executor(config("llama"))
    norm = made.model.model.norm
    add = norm.add

    def faulty(x: torch.Tensor, residual: Any) -> Any:
        normed, total = add(x, residual)
        return fault(normed), total

    norm.add = faulty
    with pytest.raises(error, match=text):
        steps(made)


def test_experts_that_count_on_the_host_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from sixfold.platforms.triton_kernels import experts

    sort = experts._by_expert
    made = TARGETS[0].executor(config("deepseek_v3"), records=True)
    monkeypatch.setattr(experts, "_by_expert", lambda ids, n: sort(ids, min(n, int(ids.max()))))
    with pytest.raises(HostRead, match=r"Tensor\.(__int__|item)"):
        steps(made)


def test_a_read_below_python_is_caught() -> None:
    """Where no Python function is called, torch itself refuses: the value does not exist."""
    made = TARGETS[0].executor(config("llama"))
    mlp = made.model.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x) * torch.ops.aten._local_scalar_dense(x[0, 0])
    with pytest.raises(DataDependentOutputException, match="_local_scalar_dense"):
        steps(made)


def test_a_plan_left_on_the_host_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    made = TARGETS[0].executor(config("llama"))
    program = made.program
    bind = program.bind

    def on_the_host(*args: Any) -> Any:
        bound = bind(*args)
        bound[0].slots = torch.zeros(3, dtype=torch.int32)
        return bound

    monkeypatch.setattr(program, "bind", on_the_host)
    with pytest.raises(RuntimeError, match="write_kernel gets tensors on cpu and cuda:0"):
        steps(made)
