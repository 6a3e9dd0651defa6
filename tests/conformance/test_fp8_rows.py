"""Contract of ops that round activations to eight-bit floats: the reference's format is torch's,
its scales are what the checkpoints' rule says, and wrong kernels are found by the suite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.kernel_checks import cpu_facts

from sixfold.common.ops import OPS
from sixfold.common.ops.conformance import check_op
from sixfold.common.ops.fp8_rows import MOST, block_quant, rounded_e4m3
from sixfold.common.ops.suite import kernel_subject
from sixfold.platforms.cpu.device import CpuDevice
from sixfold.platforms.interface_kernels import Kernel
from sixfold.platforms.torch_runtime import fp8_rows as generic
from sixfold.platforms.torch_runtime.conformance import TorchRunner


@pytest.mark.parametrize("form", MOST)
def test_every_code_and_every_tie_is_rounded_as_torch_rounds(form: str) -> None:
    dtype = generic.DTYPES[form]
    every = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    every = np.unique(every[every.isfinite()].double().numpy())
    ties = (every[1:] + every[:-1]) / 2
    near = np.concatenate([ties * (1 - 1e-6), ties, ties * (1 + 1e-6)])
    values = np.concatenate([every, near])
    wanted = torch.from_numpy(values).float().to(dtype).float().numpy()
    np.testing.assert_array_equal(rounded_e4m3(values, form), wanted)
    assert rounded_e4m3(np.array([1e9, -1e9]), form).tolist() == [MOST[form], -MOST[form]]


def test_scales_by_hand() -> None:
    """448 needs no scale, 449 twice the next; below the least magnitude there is one scale."""
    x = np.array([[448.0, 1.0, 449.0, -2.0, 0.0, 0.0, 1e-6, 0.0]], np.float32)
    values, scales = block_quant(x, 2, True, "ocp")
    least = 2.0 ** np.ceil(np.log2(1e-4 / 448))
    assert scales.tolist() == [[1.0, 2.0, least, least]]
    assert values[0, :6].tolist() == [448.0, 1.0, 224.0, -1.0, 0.0, 0.0]
    plain, scales = block_quant(x, 2, False, "fnuz")
    assert plain[0, 0] == plain[0, 2] == 240.0
    np.testing.assert_allclose(scales[0, :2], [448 / 240, 449 / 240], rtol=1e-6)


def _biased(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The other format's range."""
    return lambda **a: fn(**{**a, "form": "ocp" if a["form"] == "fnuz" else "fnuz"})


def _never_a_power(fn: Callable[..., Any]) -> Callable[..., Any]:
    return lambda **a: fn(**{**a, "power": False})


def _blocks_too_long(fn: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(**a: Any) -> Any:
        made = list(fn(**a))
        place = 1 if len(made) == 2 else 2
        made[place] = made[place].amax(dim=-1, keepdim=True).expand_as(made[place])
        return tuple(made)

    return wrong


def _twice(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Scales that do not belong to their values."""

    def wrong(**a: Any) -> Any:
        made = list(fn(**a))
        place = 1 if len(made) == 2 else 2
        made[place] = made[place] * 2
        return tuple(made)

    return wrong


def _towards_zero(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Codes cut off, not rounded."""

    def wrong(**a: Any) -> Any:
        made = list(fn(**a))
        place = 0 if len(made) == 2 else 1
        codes = made[place]
        made[place] = (codes.view(torch.uint8) & 0xFE).view(codes.dtype)
        return tuple(made)

    return wrong


FAULTS = [_biased, _never_a_power, _blocks_too_long, _twice, _towards_zero]
FUSED = ("block_quant", "inverse_rope_quant", "qk_norm_rope_quant")


def failures(op: str, fn: Callable[..., Any]) -> int:
    device = CpuDevice(cpu_facts(), threads=1)
    kernel = Kernel(op, "test", lambda facts, problem: None, fn)
    few = replace(
        OPS[op], cases=lambda rng: [c for c in OPS[op].cases(rng) if "published" not in c.name]
    )
    subject = kernel_subject(OPS[op], kernel, device.facts, TorchRunner(device))
    (verdict,) = check_op(few, [subject], dtypes=("float32",))
    return verdict.failed


@pytest.mark.parametrize("op", FUSED)
def test_the_suite_finds_wrong_kernels(op: str) -> None:
    right = getattr(generic, op)
    assert failures(op, right) == 0
    for fault in FAULTS:
        assert failures(op, fault(right)) > 0, fault.__name__


def test_the_suite_finds_what_was_not_turned() -> None:
    def not_turned(x: Any, cos: Any, sin: Any, **more: Any) -> Any:
        return generic.inverse_rope_quant(x, cos, -sin, **more)

    def not_normed(q: Any, kv: Any, kv_weight: Any, eps: float, **more: Any) -> Any:
        return generic.qk_norm_rope_quant(q, kv, kv_weight * 0 + 1, eps, **more)

    assert failures("inverse_rope_quant", not_turned)
    assert failures("qk_norm_rope_quant", not_normed)
