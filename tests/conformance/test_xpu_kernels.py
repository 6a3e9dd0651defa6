"""Guards what Intel GPUs without float64 are given: sampling that keeps its contracts and makes no
float64 tensor. On host tensors, by torch's operations."""

from __future__ import annotations

from typing import Any

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


OPS_WITH_SUMS = ("sample", "draw")


def generic(machine: str, op: str) -> Subject:
    """The torch kernel of an op as a machine's GPU gets it."""
    device = HostedDevice(select.probe_all(load(machine)[0])["xpu"].devices[0])
    registry = KernelRegistry()
    register_generic(registry, device)
    suite = suite_of(registry, device.facts, TorchRunner(device), "emulated")
    (found,) = (one for one in suite.subjects if (one.op, one.provider) == (op, "generic"))
    return found


class _Wide(TorchDispatchMode):
    """Counts the float64 tensors that operations give."""

    found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            self.found += isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64
        return result


@pytest.mark.parametrize("op", OPS_WITH_SUMS)
def test_sums_in_float32_keep_the_contract(op: str) -> None:
    (verdict,) = check_op(OPS[op], [generic("intel_arc_b580", op)])
    assert (verdict.status, verdict.failures) == ("pass", [])


@pytest.mark.parametrize("op", OPS_WITH_SUMS)
@pytest.mark.parametrize(
    ("machine", "makes"),
    [("intel_arc_b70", False), ("intel_core_ultra", False), ("intel_max_1550", True)],
)
def test_float64_is_made_where_the_card_has_it_and_nowhere_else(
    machine: str, makes: bool, op: str
) -> None:
    with _Wide() as wide:
        check_op(OPS[op], [generic(machine, op)])
    assert (wide.found > 0) is makes


@pytest.mark.parametrize("op", OPS_WITH_SUMS)
@pytest.mark.parametrize("width", [torch.float32, torch.float64])
def test_triton_leaves_filtered_rows_to_the_generic_kernel_in_the_same_width(
    op: str, width: torch.dtype
) -> None:
    from sixfold.platforms.triton_kernels.register import register_triton

    machine = "intel_arc_b580" if width == torch.float32 else "intel_max_1550"
    device = HostedDevice(select.probe_all(load(machine)[0])["xpu"].devices[0])
    registry = KernelRegistry()
    register_triton(registry, device)
    (kernel,) = (k for k in registry.kernels() if k.op == op)
    assert kernel.fn.keywords == {"wide": width}  # type: ignore[attr-defined]
