"""Guards what Intel GPUs without float64 are given: sampling that keeps its contract and makes no
float64 tensor. On host tensors, by torch's operations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.recorded_machines import load
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sixfold.common.ops import OPS
from sixfold.common.ops.conformance import check_op
from sixfold.common.ops.registry import KernelRegistry
from sixfold.common.ops.suite import suite_of
from sixfold.platforms import select
from sixfold.platforms.interface_kernels import Subject
from sixfold.platforms.torch_runtime.conformance import TorchRunner
from sixfold.platforms.torch_runtime.interpreted import HostedDevice
from sixfold.platforms.torch_runtime.kernels import register_generic

pytest.importorskip("triton")


def subjects(machine: str) -> dict[str, Subject]:
    from sixfold.platforms.xpu.kernels import register

    device = HostedDevice(select.probe_all(load(machine)[0])["xpu"].devices[0])
    registry = KernelRegistry()
    register_generic(registry, device)
    register(registry, device)
    suite = suite_of(registry, device.facts, TorchRunner(device), "emulated")
    return {one.provider: one for one in suite.subjects if one.op == "sample"}


class _Wide(TorchDispatchMode):
    """Counts the float64 tensors that operations give."""

    found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            self.found += isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64
        return result


def test_sums_in_float32_keep_the_contract() -> None:
    (verdict,) = check_op(OPS["sample"], [subjects("intel_arc_b580")["float32_sums"]])
    assert (verdict.status, verdict.failures) == ("pass", [])


@pytest.mark.parametrize(("provider", "makes"), [("float32_sums", False), ("generic", True)])
def test_no_float64_is_made_and_the_generic_kernel_makes_some(provider: str, makes: bool) -> None:
    with _Wide() as wide:
        check_op(OPS["sample"], [subjects("intel_arc_b580")[provider]])
    assert (wide.found > 0) is makes


@pytest.mark.parametrize(
    ("machine", "reason"),
    [("intel_arc_b70", None), ("intel_core_ultra", None), ("intel_max_1550", "has float64")],
)
def test_the_card_with_float64_keeps_it(machine: str, reason: str | None) -> None:
    case = next(iter(OPS["sample"].cases(np.random.default_rng(0))))
    said = subjects(machine)["float32_sums"].requires(case, "float32")
    assert said is None if reason is None else reason in str(said)
