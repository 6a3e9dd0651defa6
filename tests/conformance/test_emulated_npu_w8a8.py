"""Guards the npu platform's product of eight bits by eight bits, over the emulator of torch_npu:
the contract of `linear` for checkpoints that ask for it, that these alone get it, and a whole model
against transformers. Evidence of the kind "emulated"."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.emulated_npu import module
from support.emulated_npu.platform import PLATFORM, EmulatedDevice, facts
from support.tiny_models import TINY
from support.tiny_packed import compressed, described, write_packed_model
from support.token_rounding import Product, TokenRounded

from sixfold.platforms.interface import EngineSpec
from sixfold.platforms.interface_kernels import Problem
from sixfold.platforms.npu import token_rounded
from sixfold.platforms.npu.kernels import register

PRODUCT = Product(
    token_rounded.PROVIDER,
    token_rounded.prepare,
    token_rounded.linear,
    EmulatedDevice(facts()),
    register,
    ("bfloat16", "float16"),
)


@pytest.fixture(scope="module", autouse=True)
def oracles() -> None:
    """`transformers` looks for a real device once, so before the emulator is there."""
    torch.set_num_threads(1)
    TINY["llama"].model()


@pytest.fixture(autouse=True)
def library(oracles: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    emulator = module()
    monkeypatch.setitem(sys.modules, "torch_npu", emulator)
    return emulator


@pytest.fixture(params=[compressed(False, 8, -1), described()], ids=["compressed", "described"])
def asking(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def plain() -> Any:
    return compressed(False, 8, -1, by_token=False)


class TestTokenRounded(TokenRounded):
    product = PRODUCT


@pytest.mark.parametrize(
    ("dtype", "dims", "weights", "reason"),
    [
        ("float32", {}, "int8_token", "takes float16 and bfloat16"),
        ("float16", {"k": 65536}, "int8_token", "k is up to 65535"),
        ("float16", {}, "int8_channel", "rounds activations, which int8_channel weights do not"),
    ],
)
def test_what_it_is_not_for_is_refused(
    dtype: str, dims: dict[str, int], weights: str, reason: str
) -> None:
    kernel = token_rounded.kernel(PRODUCT.device)
    assert reason in str(kernel.requires(facts(), Problem("linear", dtype, dims, weights)))


def decided(path: Path, **fields: Any) -> dict[str, Any]:
    spec = EngineSpec(str(path), max_rows=4, max_context=128, cache_tokens=512, **fields)
    executor = PLATFORM.executor(spec, facts())
    try:
        return {decision.what: decision for decision in executor.load().decisions}
    finally:
        executor.close()


def test_the_executor_tells_what_becomes_of_activations(tmp_path: Path) -> None:
    write_packed_model(tmp_path, TINY["llama"], compressed(False, 8, -1))
    told = decided(tmp_path)["activations of linear"]
    asked = "the checkpoint asks for int8, a scale per token"
    assert (told.chosen, told.because) == ("int8, a scale per token", asked)
    named = decided(tmp_path, kernels={"linear": "torch_npu"})["activations of linear"]
    assert named.chosen == "float16, not rounded"
    assert named.because == f"{asked}; 'torch_npu' rounds less"


def test_it_tells_nothing_where_no_checkpoint_asks(tmp_path: Path) -> None:
    write_packed_model(tmp_path, TINY["llama"], compressed(False, 8, -1, by_token=False))
    decisions = decided(tmp_path)
    assert decisions["kernel linear"].chosen == "torch_npu"
    assert "activations of linear" not in decisions


# ---- faults


def no_scale_of_rows(library: Any) -> None:
    op = library.npu_quant_matmul

    def faulty(*args: Any, **given: Any) -> Any:
        given["pertoken_scale"] = torch.ones_like(given["pertoken_scale"])
        return op(*args, **given)

    library.npu_quant_matmul = faulty


def scale_of_the_row_above(library: Any) -> None:
    op = library.npu_dynamic_quant

    def faulty(x: Any) -> Any:
        rounded, steps = op(x)
        return rounded, steps.roll(1)

    library.npu_dynamic_quant = faulty


@pytest.mark.parametrize("fault", [no_scale_of_rows, scale_of_the_row_above])
def test_a_fault_is_caught(fault: Callable[[Any], None], library: Any) -> None:
    fault(library)
    assert PRODUCT.verdict().status == "fail"
