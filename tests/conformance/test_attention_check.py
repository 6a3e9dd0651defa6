"""Guards `torch_runtime/attention_check.py`: on devices that ask for it, the backend that serves is
the first that gives right numbers at load; one that does not is named with what it got wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.kernel_checks import cpu_facts
from support.tiny_models import TINY, save

from sixfold.common.errors import KernelError
from sixfold.common.ops.registry import KernelRegistry
from sixfold.platforms.cpu.device import CpuDevice
from sixfold.platforms.interface import EngineSpec
from sixfold.platforms.interface_attention import AttentionSpec
from sixfold.platforms.torch_runtime.attention import SdpaAttention
from sixfold.platforms.torch_runtime.attention_check import resolve_right
from sixfold.platforms.torch_runtime.executor import TorchExecutor
from sixfold.platforms.xpu.device import XPUDevice

PLAIN = AttentionSpec(heads=6, kv_heads=2, head_dim=24, scale=0.3)
SPECS = {
    "plain": PLAIN,
    "window": AttentionSpec(heads=4, kv_heads=4, head_dim=16, scale=0.25, window=20),
    "sinks, cap": AttentionSpec(4, 2, 16, 0.25, soft_cap=3.0, sinks=True),
    "bfloat16": AttentionSpec(9, 3, 64, 0.125, dtype="bfloat16"),
}


def nearly(result: torch.Tensor, q: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    return result * 1.05


def last_row(result: torch.Tensor, q: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """As of a kernel that ends one row too early."""
    return torch.cat((result[:-1], torch.zeros_like(result[-1:])))


def not_a_number(result: torch.Tensor, q: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    return result.index_fill(1, torch.tensor([0]), torch.nan)


def raises(result: torch.Tensor, q: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    raise RuntimeError("the driver says no")


class Fast(SdpaAttention):
    """The backend that a document prefers, with a fault."""

    name = "fast"

    def __init__(self, device: Any, fault: Any) -> None:
        super().__init__(device)
        self._fault = fault

    def run(self, bound: Any, pool: Any, layer: int, *args: Any) -> torch.Tensor:
        q, spec = args[0], args[3]
        return self._fault(super().run(bound, pool, layer, *args), q, spec)


def registry(device: Any, fault: Any) -> KernelRegistry:
    made = KernelRegistry()
    made.add_attention(SdpaAttention(device))
    made.add_attention(Fast(device, fault), priority=10)
    return made


@pytest.fixture(scope="module")
def device() -> CpuDevice:
    return CpuDevice(cpu_facts(), threads=1)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("page_size", [None, 1, 128])
def test_a_right_backend_serves(device: CpuDevice, spec: AttentionSpec, page_size: Any) -> None:
    found = registry(device, lambda result, q, spec: result)
    backend, decision = resolve_right(found, [spec, spec], device, None, False, page_size)
    assert backend.name == "fast"
    assert not decision.fallback
    assert decision.because.endswith("right in a check here")


@pytest.mark.parametrize("fault", [nearly, last_row, not_a_number, raises])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_wrong_one_gives_way(device: CpuDevice, spec: AttentionSpec, fault: Any) -> None:
    backend, decision = resolve_right(registry(device, fault), [spec], device, None, False, None)
    assert backend.name == "sdpa"
    assert decision.fallback
    ((name, reason),) = decision.rejected
    assert name == "fast"
    assert reason.startswith("wrong on this device: decode: ")
    assert ("driver says no" if fault is raises else "elements differ") in reason


def test_a_wrong_one_that_is_named_is_refused(device: CpuDevice) -> None:
    with pytest.raises(KernelError, match=r"'fast' is wrong on this device: .* Leave --kernel"):
        resolve_right(registry(device, nearly), [PLAIN], device, "fast", False, None)


def test_strict_refuses_to_give_way(device: CpuDevice) -> None:
    with pytest.raises(KernelError, match=r"Strict mode refuses .*wrong on this device"):
        resolve_right(registry(device, nearly), [PLAIN], device, None, True, None)


def test_none_that_is_right_ends_the_load(device: CpuDevice) -> None:
    made = KernelRegistry()
    made.add_attention(Fast(device, nearly))
    with pytest.raises(KernelError, match=r"No kernel can serve op 'attention' \(fast: wrong"):
        resolve_right(made, [PLAIN], device, None, False, None)


class Doubted(CpuDevice):
    checks_attention = True


def test_a_device_that_asks_for_it_is_served_by_the_right_one(tmp_path: Path) -> None:
    assert XPUDevice.checks_attention
    save(TINY["llama"].model(), tmp_path)
    assert served_by(CpuDevice(cpu_facts(), threads=1), tmp_path) == "fast"
    assert served_by(Doubted(cpu_facts(), threads=1), tmp_path) == "sdpa"


def served_by(device: CpuDevice, folder: Path) -> str:
    spec = EngineSpec(str(folder), max_context=64, cache_tokens=128)
    fast = Fast(device, nearly)
    executor = TorchExecutor(spec, device, lambda made: made.add_attention(fast, priority=10))
    decisions = executor.load().decisions
    executor.close()
    return next(d.chosen for d in decisions if d.what == "kernel attention")
