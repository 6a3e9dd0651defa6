"""Guards the xpu platform against traps that its users reported: queries, keys and values that are
views into one product, and attention over them with grouped heads and a mask (intel/torch-xpu-ops
4369). torch's attention on host tensors: evidence of the kind "emulated". Reports of shapes and
numbers are cases of the contracts: see `cases` of `common/ops/{attention,rope,dense,logprobs}.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.attention_checks import CutFromOneProduct
from support.recorded_machines import load

from sixfold.common.ops import OPS
from sixfold.common.ops import attention as contract
from sixfold.common.ops.conformance import Verdict, check_op, round_case
from sixfold.common.ops.registry import KernelRegistry
from sixfold.common.ops.suite import suite_of
from sixfold.platforms import select
from sixfold.platforms.torch_runtime.attention import SdpaAttention
from sixfold.platforms.torch_runtime.conformance import TorchRunner, to_numpy
from sixfold.platforms.torch_runtime.interpreted import HostedDevice
from sixfold.platforms.torch_runtime.kernels import register_generic

FACTS = select.probe_all(load("intel_arc_b580")[0])["xpu"].devices[0]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", ["mixed", "gqa_64", "window_chunk", "dim_200"])
def test_views_into_one_product_are_attended_to(name: str) -> None:
    shape = next(shape for shape in contract.SHAPES if shape.name == name)
    case = round_case(OPS["attention"], contract.build(np.random.default_rng(3), shape), "float16")
    device = HostedDevice(FACTS)
    result, _ = TorchRunner(device).attend(
        CutFromOneProduct(SdpaAttention(device)), case, "float16"
    )
    near = OPS["attention"].tolerance["float16"]
    want = contract.attention(**case.args)
    np.testing.assert_allclose(to_numpy(result), want, rtol=near.rtol, atol=near.atol)


# ---- each report, as a fault that the contract's cases catch


def topk_that_is_wrong_past_4096(topk: Any) -> Callable[..., Any]:
    """pytorch 191871."""

    def faulty(x: torch.Tensor, *given: Any, **named: Any) -> Any:
        return topk(x[..., :4096], *given, **named)

    return faulty


def topk_that_gives_no_place_beside_nan(topk: Any) -> Callable[..., Any]:
    """intel/torch-xpu-ops 4839; here what stands for NaN is an infinity."""

    def faulty(x: torch.Tensor, *given: Any, **named: Any) -> Any:
        values, places = topk(x, *given, **named)
        lost = torch.isinf(x).any(-1, keepdim=True) & (len(x) >= 512)
        return values, torch.where(lost, -1, places)

    return faulty


def verdict(op: str) -> Verdict:
    device, registry = HostedDevice(FACTS), KernelRegistry()
    register_generic(registry, device)
    subjects = suite_of(registry, FACTS, TorchRunner(device), "emulated").subjects
    (found,) = check_op(OPS[op], [s for s in subjects if (s.op, s.provider) == (op, "generic")])
    return found


@pytest.mark.parametrize(
    ("fault", "case"),
    [
        (topk_that_is_wrong_past_4096, "past_4096"),
        (topk_that_gives_no_place_beside_nan, "nan_beside_many"),
    ],
)
def test_a_wrong_topk_is_caught(
    fault: Callable[..., Any], case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert verdict("logprobs").status == "pass"
    monkeypatch.setattr(torch, "topk", fault(torch.topk))
    assert case in {failure.case for failure in verdict("logprobs").failures}


def test_sixteen_bits_that_are_right_in_small_products_alone_are_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """intel/compute-runtime 1000, intel/torch-xpu-ops 5220."""
    assert verdict("linear").status == "pass"
    plain = torch.nn.functional.linear

    def faulty(x: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
        wrong = x.dtype != torch.float32 and weight.numel() >= 512 * 512
        return plain(x, weight, bias) * (torch.nan if wrong else 1)

    monkeypatch.setattr(torch.nn.functional, "linear", faulty)
    failures = verdict("linear").failures
    assert {(f.case, f.dtype) for f in failures} == {
        ("real_size", "bfloat16"),
        ("real_size", "float16"),
    }
