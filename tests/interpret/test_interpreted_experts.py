"""Guards the Triton experts on quantised stacks, in Triton's interpreter: every case of each form,
tiles of many rows, NaN, a batch that changes nothing, and faults in the source."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.triton_checks import InterpretedDevice, triton_facts, triton_registry, with_fault

from sixfold.common.ops import OPS
from sixfold.common.ops.conformance import Verdict, check_op
from sixfold.common.ops.quantised_linear import FORMS
from sixfold.common.ops.suite import kernel_subject
from sixfold.platforms.interface_kernels import Kernel
from sixfold.platforms.torch_runtime.conformance import TorchRunner
from sixfold.platforms.torch_runtime.kernels import GENERIC
from sixfold.platforms.triton_kernels import experts as module
from sixfold.platforms.triton_kernels import tuning

KERNELS = {kernel.op: kernel for kernel in triton_registry().kernels()}
CUT = tuning.choose(triton_facts())


def judged(scheme: str, fn: Any = None, dtype: str = "float16") -> Verdict:
    known = KERNELS["moe_experts"]
    kernel = Kernel(known.op, "triton", known.requires, fn or known.fn, prepare=known.prepare)
    op, runner = OPS[f"moe_experts/{scheme}"], TorchRunner(InterpretedDevice())
    subject = kernel_subject(op, kernel, triton_facts(), runner)
    (verdict,) = check_op(op, [subject], dtypes=(dtype,))
    return verdict


NARROW = ("packed_int4", "fp8_block")
WIDE = [pytest.param(form, marks=pytest.mark.wide) for form in FORMS if form not in NARROW]


@pytest.mark.parametrize("scheme", [*NARROW, *WIDE])
def test_every_case_of_every_form(scheme: str) -> None:
    verdict = judged(scheme)
    assert (verdict.status, verdict.refused, verdict.passed) == ("pass", {}, 5), verdict
    assert verdict.errors["float16"] < 1e-2  # of results of size one to ten


def layer(rows: int, count: int = 2, top_k: int = 1) -> dict[str, torch.Tensor]:
    torch.manual_seed(rows)
    return {
        "x": torch.randn(rows, 48).half(),
        "experts": torch.rand(rows, count).argsort(dim=1)[:, :top_k],
        "weights": torch.rand(rows, top_k),
        "gate_up": torch.randn(count, 2 * 24, 48).half() / 7,
        "down": torch.randn(count, 48, 24).half() / 5,
    }


def test_tiles_of_many_rows() -> None:
    given = layer(2 * CUT.experts_many.block_m)
    assert module._tile(CUT, given["x"], len(given["x"]), 2) is CUT.experts_many
    want = GENERIC["moe_experts"](**{k: v.float() if v.dtype == torch.half else v
                                     for k, v in given.items()})  # fmt: skip
    torch.testing.assert_close(module.moe_experts(CUT, **given).float(), want, rtol=1e-2, atol=1e-2)


def test_a_row_is_the_same_in_every_batch_and_nan_stays_in_its_row() -> None:
    given = layer(9, count=5, top_k=3)
    whole = module.moe_experts(CUT, **given)
    alone = {k: v[4:5] if k in ("x", "experts", "weights") else v for k, v in given.items()}
    assert torch.equal(module.moe_experts(CUT, **alone)[0], whole[4])
    given["x"][4, 7] = torch.nan
    spoilt = module.moe_experts(CUT, **given)
    assert spoilt[4].isnan().all()
    others = torch.arange(9) != 4
    assert torch.equal(spoilt[others], whole[others])


def test_a_router_of_nan_gives_nan_and_no_expert_beyond_the_last() -> None:
    given = layer(3, count=5)
    logits = torch.randn(3, 5)
    logits[1] = torch.nan
    stacks = given["gate_up"], given["down"]
    got = KERNELS["moe"].fn(given["x"], logits, *stacks, 2, True)
    assert torch.equal(got.isnan().all(1), torch.tensor([False, True, False]))


@pytest.mark.parametrize(
    ("scheme", "old", "new"),
    [
        ("fp8_block", "matrix * tl.cdiv(n, SQUARES)", "matrix * (n // SQUARES)"),
        ("awq_int4", "shift_ptr + output", "shift_ptr + column"),
        ("mxfp4", "CLAMPED=form[\"limit\"] > 0", "CLAMPED=False"),
    ],
)  # fmt: skip
def test_a_faulty_source_is_caught(scheme: str, old: str, new: str, tmp_path: Path) -> None:
    fn = with_fault("experts", old, new, tmp_path).moe_experts
    assert judged(scheme, partial(fn, CUT)).status == "fail"
