"""Guards the xpu platform's product of stored integers of four bits through oneDNN against the
contracts of `linear`, and each of its traps: strided activations and weights, biases of one axis,
columns that fill no group, scales that the dtype rounds. Over an emulator of the operation, behind
torch's schema. Eight bits: `test_xpu_w8a8`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.emulated_onednn import installed
from support.recorded_machines import load

from sixfold.common.errors import KernelError
from sixfold.common.ops import OPS
from sixfold.common.ops.conformance import Verdict, check_op
from sixfold.common.ops.quantised_linear import awq_int4, packed_int4, rows_values
from sixfold.common.ops.registry import KernelRegistry
from sixfold.common.ops.suite import suite_of
from sixfold.platforms import select
from sixfold.platforms.interface_kernels import Problem
from sixfold.platforms.torch_runtime.conformance import TorchRunner
from sixfold.platforms.torch_runtime.interpreted import HostedDevice
from sixfold.platforms.xpu import onednn

FACTS = select.probe_all(load("intel_arc_b580")[0])["xpu"].devices[0]


@pytest.fixture(autouse=True)
def operation() -> Iterator[None]:
    torch.set_num_threads(1)
    with installed():
        yield


def verdict(title: str) -> Verdict:
    device, registry = HostedDevice(FACTS), KernelRegistry()
    for kernel in onednn.kernels(device):
        registry.add(kernel)
    subjects = suite_of(registry, FACTS, TorchRunner(device), "emulated").subjects
    (found,) = check_op(
        OPS[title], [s for s in subjects if (s.op, s.provider) == (title, onednn.PROVIDER)]
    )
    return found


@pytest.mark.parametrize("title", ["linear/packed_int4", "linear/awq_int4"])
def test_it_equals_its_reference(title: str) -> None:
    found = verdict(title)
    assert (found.status, found.failures) == ("pass", [])
    assert found.passed >= 9


def matrix(form: Callable[..., Any], dtype: str, n: int = 24, k: int = 96, **change: Any) -> Any:
    rows = replace(form(np.random.default_rng(5), n, k), **change)
    problem = Problem("linear", dtype, {"k": k, "n": n}, form.__name__)
    return rows, onednn.prepare(rows, problem, HostedDevice(FACTS))


def test_neighbouring_groups_of_one_scale_are_one_group() -> None:
    rows = packed_int4(np.random.default_rng(5), 24, 128)
    same = np.repeat(rows.scale[:, :1], 4, axis=1)
    _, made = matrix(packed_int4, "float16", k=128, scale=same)
    assert (made.group, tuple(made.scale.shape)) == (128, (1, 24))
    pairs = np.repeat(rows.scale[:, :2], 2, axis=1)
    rows, made = matrix(packed_int4, "float16", k=128, scale=pairs)
    assert (made.group, tuple(made.scale.shape)) == (64, (2, 24))
    x = torch.randn(3, 128, dtype=torch.float16)
    want = x.float() @ torch.from_numpy(rows_values(rows)).t()
    torch.testing.assert_close(onednn.linear(x, made).float(), want, rtol=2e-3, atol=2e-2)


def test_strided_activations_and_a_bias_of_one_axis() -> None:
    """As a model cuts them from one product."""
    _, made = matrix(packed_int4, "float16")
    whole, bias = torch.randn(5, 200, dtype=torch.float16), torch.randn(24, dtype=torch.float16)
    cut = whole[:, 100:196]
    assert not cut.is_contiguous()
    got = onednn.linear(cut, made, bias)
    assert torch.equal(got, onednn.linear(cut.clone(), made, bias))
    assert torch.equal(got, torch.cat([onednn.linear(row[None], made, bias) for row in cut]))


def test_scales_that_the_dtype_rounds_are_refused() -> None:
    with pytest.raises(KernelError, match=r"keeps scales in torch\.bfloat16"):
        matrix(packed_int4, "bfloat16")


def test_minimums_that_are_no_zeros_are_refused() -> None:
    rows = awq_int4(np.random.default_rng(5), 24, 96)
    assert rows.minimum is not None
    with pytest.raises(KernelError, match="minimums that are not zeros"):
        matrix(awq_int4, "float16", minimum=rows.minimum + 0.4 * rows.scale)


@pytest.mark.parametrize(
    ("dtype", "weights", "libraries", "reason"),
    [
        ("bfloat16", "packed_int4", {"torch": "2.13.0"}, "--dtype float16 keeps them"),
        ("float16", "mxfp4", {"torch": "2.13.0"}, "has no mxfp4 weights"),
        ("float16", "packed_int4", {"torch": "2.7.1"}, "written for torch 2.13, there is 2.7.1"),
        ("float16", "packed_int4", {}, "there is none"),
    ],
)
def test_what_it_is_not_for_is_refused(
    dtype: str, weights: str, libraries: dict[str, str], reason: str
) -> None:
    facts = replace(FACTS, libraries=libraries)
    kernel, _ = onednn.kernels(HostedDevice(facts))
    assert reason in str(kernel.requires(facts, Problem("linear", dtype, {}, weights)))


# ---- faults


def other_nibble_first(made: Any) -> Any:
    codes = made.data.view(torch.uint8)
    return replace(made, data=((codes << 4) | (codes >> 4)).view(torch.int32))


def no_zeros(made: Any) -> Any:
    return replace(made, zeros=torch.zeros_like(made.zeros))


def transposed_scales(made: Any) -> Any:
    return replace(made, scale=made.scale.t().contiguous())


def strided_weights(made: Any) -> Any:
    return replace(made, data=torch.cat([made.data, made.data], 1)[:, : made.data.shape[1]])


def wide_scales(made: Any) -> Any:
    return replace(made, scale=made.scale.float())


@pytest.mark.parametrize(
    "fault", [other_nibble_first, no_zeros, transposed_scales, strided_weights, wide_scales]
)
def test_a_fault_in_the_form_is_caught(
    fault: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = onednn.prepare

    def faulty(*given: Any) -> Any:
        return fault(prepare(*given))

    monkeypatch.setattr(onednn, "prepare", faulty)
    assert verdict("linear/packed_int4").status == "fail"
