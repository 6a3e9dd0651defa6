"""Guards every model on an Ascend NPU that is not here: traced on fake tensors of the device key of
torch_npu, through prefill, decode and mixed steps and the buckets of captured ones; all is on the
device and nothing is read back in the forward. Evidence of the kind "traced": no values.

The adapters to torch_npu are the real ones, over shape functions (`support/emulated_npu/fake.py`).
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.emulated_npu import NPUError
from support.emulated_npu.fake import fake_module
from support.fake_device import FakeExecutor, HostRead
from support.graph_stand_in import StandInGraphs
from support.random_source import RandomSource
from support.recorded_machines import load
from support.tiny_torch_model import Driver
from support.traced_models import FAMILIES, MIXTURES, config, steps

from sixfold.platforms import select
from sixfold.platforms.interface import EngineSpec
from sixfold.platforms.interface_step import LAST_TOKEN
from sixfold.platforms.npu import kernels
from sixfold.platforms.npu.attention import FusedInferAttention
from sixfold.platforms.torch_runtime.device import TorchDevice

DEVICE = "privateuseone:0"
"""torch's name of the key as long as no torch_npu has called it "npu"."""
READ_LENGTHS = {"qwen3_5_text", "qwen3_5_moe_text", "deepseek_v3", "deepseek_v4"}
"""Whose longer rows go through generic kernels that read lengths on the host: slow, and not in a
recording. Their decode steps do not."""
OWN_ATTENTION = {"deepseek_v3", "deepseek_v4"}
SINKS = {"gpt_oss"}
"""Which fused infer attention does not document: generic attention, op by op."""


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch, family: str) -> list[str]:
    """What was called of the library. It comes after `transformers`, which would look in it."""
    config(family)
    library, called = fake_module(DEVICE)
    monkeypatch.setitem(sys.modules, "torch_npu", library)
    return called


def executor(family: str, machine: str = "ascend_910b") -> FakeExecutor:
    facts = select.probe_all(load(machine)[0])["npu"].devices[0]
    facts = replace(facts, libraries={**facts.libraries, "torch_npu": "2.13.0"})
    device = TorchDevice(facts, DEVICE)
    spec = EngineSpec("", max_rows=8, cache_tokens=4096, max_context=128)
    stand_in = StandInGraphs(captures=False, device=DEVICE)

    def register(registry: Any) -> None:
        kernels.register(registry, device)

    return FakeExecutor(device, register, RandomSource(config(family)), spec, stand_in)


def decodes(made: FakeExecutor) -> int:
    """Rows that begin with one token, and go on."""
    driver = Driver(made.info)
    for rows in ([(0, [1]), (1, [4])], [(1, [LAST_TOKEN]), (0, [LAST_TOKEN]), (2, [7])]):
        made.run(driver.batch(rows))
    return 2


NARROW = ("llama", "qwen3_moe", "gemma3")


def wide(family: str) -> Any:
    return family if family in NARROW else pytest.param(family, marks=pytest.mark.wide)


@pytest.mark.parametrize("family", [wide(family) for family in FAMILIES])
def test_every_model_stays_on_the_device(family: str, called: list[str]) -> None:
    made = executor(family)
    if family in READ_LENGTHS:
        with pytest.raises(HostRead):
            steps(made)
        made = executor(family)
        assert decodes(made) == 2
    else:
        assert steps(made) == 4
    devices = {p.device for p in [*made.model.parameters(), *made.model.buffers()]}
    assert devices == {torch.device(DEVICE)}
    decisions = {d.what: d for d in made.info.decisions}
    assert decisions["dtype"].chosen == "bfloat16"
    assert decisions["step"].chosen == ("op by op" if family in SINKS else "in buckets")
    assert family in SINKS or made.record() == 4  # buckets of 1, 2, 4 and 8 rows
    assert ("npu_grouped_matmul" in called) is (family in MIXTURES)
    recorded = "npu_fused_infer_attention_score.out" in called
    assert recorded is (family not in OWN_ATTENTION | SINKS)


# ---- faults


@pytest.mark.parametrize("family", ["llama"])
def test_a_plan_left_on_the_host_is_caught(
    family: str, called: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = executor(family)
    monkeypatch.setattr(FusedInferAttention, "bind", _on_the_host(FusedInferAttention.bind))
    with pytest.raises(NPUError, match="npu_scatter_pa_kv_cache: a tensor on cpu"):
        steps(made)


def _on_the_host(bind: Any) -> Any:
    def left(*args: Any) -> Any:
        bound = bind(*args)
        return replace(bound, slots=torch.zeros(len(bound.slots), dtype=torch.int64))

    return left


@pytest.mark.parametrize("family", ["llama"])
def test_a_mask_made_in_the_forward_is_caught(
    family: str, called: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = executor(family)
    run = FusedInferAttention.run

    def late(self: Any, *args: Any) -> Any:
        self._triangle = None
        self._mask()
        return run(self, *args)

    monkeypatch.setattr(FusedInferAttention, "run", late)
    with pytest.raises(HostRead, match="moves a tensor from cpu"):
        steps(made)
