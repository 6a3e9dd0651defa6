"""Guards the npu platform against traps that users of the library reported: queries, keys and
values that are views into one product. Over the emulator, which refuses what the device reads
wrongly.

Reports: vllm-ascend 11834 (fused infer attention and strided keys), 12172 (the cache write and
strided keys). Those of shapes and numbers are cases of the contracts: see `cases` of
`common/ops/{attention,rope,dense,logprobs}.py`."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from support.attention_checks import CutFromOneProduct
from support.emulated_npu import NPUError, module
from support.emulated_npu.platform import EmulatedDevice, facts

from sixfold.common.ops import OPS
from sixfold.common.ops import attention as contract
from sixfold.common.ops.conformance import round_case
from sixfold.platforms.npu.attention import FusedInferAttention
from sixfold.platforms.torch_runtime.conformance import TorchRunner, to_numpy

SHAPES = ("decode_page_128", "prefill_page_128", "window_page_128")
TOLERANCE = OPS["attention"].tolerance["bfloat16"]


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> Any:
    torch.set_num_threads(1)
    emulator = module()
    monkeypatch.setitem(sys.modules, "torch_npu", emulator)
    return emulator


def attended(name: str) -> tuple[np.ndarray, np.ndarray]:
    shape = next(shape for shape in contract.SHAPES if shape.name == name)
    case = round_case(OPS["attention"], contract.build(np.random.default_rng(3), shape), "bfloat16")
    device = EmulatedDevice(facts())
    backend = CutFromOneProduct(FusedInferAttention(device))
    result, _ = TorchRunner(device).attend(backend, case, "bfloat16")
    return to_numpy(result), contract.attention(**case.args)


@pytest.mark.parametrize("name", SHAPES)
def test_views_into_one_product_are_attended_to(name: str) -> None:
    got, want = attended(name)
    np.testing.assert_allclose(got, want, rtol=TOLERANCE.rtol, atol=TOLERANCE.atol)


def test_a_view_that_reaches_an_op_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault: `contiguous` left out."""
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda tensor: tensor)
    with pytest.raises(NPUError, match="key is not contiguous"):
        attended(SHAPES[0])
