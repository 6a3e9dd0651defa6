"""Guards the xpu platform's product of eight bits by eight bits, `torch._int_mm`: the contract of
`linear` for checkpoints that ask for it, that these alone get it, and a whole model against
transformers. By the same torch operation on the CPU: evidence of the kind "emulated"."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.recorded_machines import load
from support.tiny_models import TINY, expected_logits, prompt
from support.tiny_packed import compressed, write_packed_model
from support.token_rounding import (
    Product,
    TokenRounded,
    model_logits,
    relative,
    rounded_logits,
)

from sixfold.platforms import select
from sixfold.platforms.interface_kernels import Problem
from sixfold.platforms.torch_runtime.interpreted import HostedDevice
from sixfold.platforms.xpu import onednn

FACTS = select.probe_all(load("intel_arc_b580")[0])["xpu"].devices[0]


def register(registry: Any, device: Any) -> None:
    for kernel in onednn.kernels(device):
        registry.add(kernel)


PRODUCT = Product(
    onednn.IN_BYTES,
    onednn.prepare_eight_bits,
    onednn.linear_in_eight_bits,
    HostedDevice(FACTS),
    register,
    ("float32", "bfloat16", "float16"),
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def asking() -> Any:
    return compressed(False, 8, -1)


@pytest.fixture
def plain() -> Any:
    return compressed(True, 4, 32, symmetric=True)


class TestTokenRounded(TokenRounded):
    product = PRODUCT


def test_a_model_equals_transformers_with_rounded_inputs(asking: Any, tmp_path: Path) -> None:
    """In float32, so that the same numbers are rounded up. Without rounding it would be far."""
    oracle = write_packed_model(tmp_path, TINY["llama_biases"], asking)
    file = tmp_path / "model.safetensors"
    wide = {n: t.float() if t.is_floating_point() else t for n, t in load_file(file).items()}
    save_file(wide, file, {"format": "pt"})
    tests = TestTokenRounded()
    found = model_logits(tmp_path, tests.table(tmp_path, "float32"), "float32")
    assert relative(found, rounded_logits(oracle, prompt())) < 1e-5
    assert relative(found, expected_logits(oracle, prompt())) > 0.01


def test_checkpoints_that_do_not_ask_are_refused() -> None:
    _, kernel = onednn.kernels(HostedDevice(FACTS))
    found = str(kernel.requires(FACTS, Problem("linear", "float16", {}, "int8_channel")))
    assert found == "rounds activations, which int8_channel weights do not ask for"


# ---- faults


def truncating(x: torch.Tensor) -> torch.Tensor:
    return x.trunc()


def one_scale_for_all(x: torch.Tensor, *given: Any, **named: Any) -> torch.Tensor:
    return x.abs().max().expand(len(x), 1)


@pytest.mark.parametrize(("name", "fault"), [("round", truncating), ("amax", one_scale_for_all)])
def test_a_fault_is_caught(
    name: str, fault: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, name, fault)
    assert PRODUCT.verdict().status == "fail"
