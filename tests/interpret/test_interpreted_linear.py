"""Guards the Triton `linear` and lookup on quantised matrices, in Triton's interpreter: every case
of the contracts of each form, groups and tiles that those do not have, NaN, and faults in the
source, each of which must be caught."""

from __future__ import annotations

from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.triton_checks import InterpretedDevice, triton_facts, triton_registry, with_fault

from sixfold.common.checkpoint.block_floats import Fp8Blocks
from sixfold.common.checkpoint.quantised_rows import QuantisedRows
from sixfold.common.errors import KernelError
from sixfold.common.ops import OPS
from sixfold.common.ops.conformance import Verdict, check_op
from sixfold.common.ops.quantised_linear import FORMS, GGUF_FORMS, rows_values
from sixfold.common.ops.suite import kernel_subject
from sixfold.platforms.interface_kernels import Kernel, Problem
from sixfold.platforms.torch_runtime.conformance import TorchRunner
from sixfold.platforms.triton_kernels import linear as module
from sixfold.platforms.triton_kernels import packed_matrix, tuning
from sixfold.platforms.triton_kernels.packed_matrix import PackedMatrix, pack

KERNELS = {kernel.op: kernel for kernel in triton_registry().kernels()}
CUT = tuning.choose(triton_facts())


def judged(scheme: str, dtype: str, fn: Any = None) -> Verdict:
    known = KERNELS["linear"]
    kernel = Kernel("linear", "triton", known.requires, fn or known.fn, prepare=known.prepare)
    op, runner = OPS[f"linear/{scheme}"], TorchRunner(InterpretedDevice())
    subject = kernel_subject(op, kernel, triton_facts(), runner)
    (verdict,) = check_op(op, [subject], dtypes=(dtype,))
    return verdict


@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [*product(FORMS, ("float32", "float16")), *product(GGUF_FORMS, ("float16",))],
)
def test_every_case_of_every_form(scheme: str, dtype: str) -> None:
    verdict = judged(scheme, dtype)
    assert (verdict.status, verdict.refused) == ("pass", {}), verdict
    assert verdict.passed >= 8
    # No more than the result's own rounding: nothing is lost on the way.
    assert verdict.errors[dtype] < (5e-6 if dtype == "float32" else 6e-3)


# ---- groups, tiles and shifts that the cases do not have


def stored(bits: int, group: int, zeros: bool, n: int = 37, k: int = 448) -> QuantisedRows:
    """Scales that 16 bits have, the same over `group` columns; zeros that are whole numbers."""
    rng = np.random.default_rng(bits + group)
    count, repeat = -(-k // group), group // 32
    low, high = (0, 16) if bits == 4 else (-128, 128)
    q = rng.integers(low, high, (n, k // 32, 32)).astype(np.uint8 if bits == 4 else np.int8)
    scale = rng.uniform(0.5, 1.5, (n, count)).astype(np.float16).astype(np.float32) / 1024
    minimum = scale * rng.integers(low, high, scale.shape).astype(np.float32) if zeros else None
    wide = [
        None if part is None else np.repeat(part, repeat, axis=1)[:, : k // 32]
        for part in (scale, minimum)
    ]
    return QuantisedRows(bits, q, wide[0], wide[1], k)


def packed(rows: QuantisedRows, op: str = "linear", dtype: str = "float32") -> PackedMatrix:
    made = pack(rows, Problem(op, dtype, {}, "gptq_int4"), InterpretedDevice())
    assert isinstance(made, PackedMatrix)
    return made


@pytest.mark.parametrize("rows", [4, 70], ids=["narrow", "wide"])
@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zeros"])
@pytest.mark.parametrize(("bits", "group"), [(4, 128), (4, 96), (8, 128), (8, 448)])
def test_wide_groups_and_both_tiles(bits: int, group: int, zeros: bool, rows: int) -> None:
    """float16, where numbers, zeros and sums are exact but for the last rounding."""
    matrix = stored(bits, group, zeros)
    torch.manual_seed(0)
    x = torch.randn(rows, 448).half()
    got = module.linear(CUT, x, packed(matrix, dtype="float16"))
    want = x.float() @ torch.from_numpy(rows_values(matrix)).T
    torch.testing.assert_close(got, want.half(), rtol=2e-3, atol=2e-3)


def test_parts_of_a_product_and_strides_are_taken_as_they_lie() -> None:
    matrix = packed(stored(4, 128, True))
    both = torch.randn(5, 2 * 448)
    _, x = both.chunk(2, dim=1)
    assert torch.equal(module.linear(CUT, x, matrix), module.linear(CUT, x.clone(), matrix))


def test_nan_stays_in_its_row_and_in_its_output() -> None:
    x = torch.randn(3, 448)
    x[1, 17] = torch.nan
    got = module.linear(CUT, x, packed(stored(4, 128, True)))
    assert torch.equal(got.isnan().any(1), torch.tensor([False, True, False]))
    codes = np.full((5, 200), 0x38, np.uint8)
    codes[2, 150] = 0xFF
    made = pack(Fp8Blocks(codes, np.ones((1, 2), np.float32)), Problem("linear", "float32"),
                InterpretedDevice())  # fmt: skip
    got = module.linear(CUT, torch.ones(2, 200), made)
    assert torch.equal(got.isnan()[0], torch.tensor([False, False, True, False, False]))
    assert got[0, 0] == 200.0


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_rows_of_a_table_are_its_values(bits: int, zeros: bool) -> None:
    rows = stored(bits, 128, zeros)
    table, ids = packed(rows, "embedding"), torch.tensor([36, 0, 5, 5])
    want = torch.from_numpy(rows_values(rows))[ids] * 3.0
    torch.testing.assert_close(KERNELS["embedding"].fn(ids, table, 3.0), want, rtol=1e-6, atol=0)
    assert KERNELS["embedding"].fn(ids[:0], table).shape == (0, 448)


def test_a_table_with_minimums_that_are_no_products() -> None:
    rows = FORMS["awq_int4"](np.random.default_rng(3), 9, 70)
    table = packed(rows, "embedding", "float16")
    assert table.shift == packed_matrix.MINIMUMS
    got = KERNELS["embedding"].fn(torch.arange(9), table)
    assert got.dtype == torch.float16
    torch.testing.assert_close(got, torch.from_numpy(rows_values(rows)).half())


def test_what_has_no_form_is_refused() -> None:
    with pytest.raises(KernelError, match="no form for str"):
        pack("a matrix", Problem("linear", "float32"), InterpretedDevice())


# ---- faults


def faulty(old: str, new: str, folder: Path) -> Any:
    return partial(with_fault("linear", old, new, folder).linear, CUT)


@pytest.mark.parametrize(
    ("scheme", "old", "new"),
    [
        ("packed_int4", "place // 16 * 32 + place % 16", "2 * place"),
        ("packed_int4", "(start + 16 + depth < k)", "(start + depth < k)"),
        ("awq_int4", "total += tl.sum(more", "total -= tl.sum(more"),
        ("int8_channel", "BIASED=bias is not None", "BIASED=False"),
        ("fp8_block", "column // SQUARES", "column // (2 * SQUARES)"),
        ("fp8_block", "start // GROUP if GROUP", "start // (2 * GROUP) if GROUP"),
        ("mxfp4", "(code & 8).to(tl.uint16) << 12", "(code & 8).to(tl.uint16) << 13"),
    ],
)
def test_a_faulty_source_is_caught(scheme: str, old: str, new: str, tmp_path: Path) -> None:
    assert judged(scheme, "float32", faulty(old, new, tmp_path)).status == "fail"


@pytest.mark.parametrize("old", ["number -= zero", "column % 32 < 16"])
def test_a_faulty_lookup_is_caught(old: str, tmp_path: Path) -> None:
    new = {"number -= zero": "number += zero", "column % 32 < 16": "column % 32 < 15"}[old]
    rows = stored(4, 128, True)
    made, ids = with_fault("linear", old, new, tmp_path), torch.arange(37)
    want = torch.from_numpy(rows_values(rows))
    assert not torch.allclose(made.lookup(CUT, ids, packed(rows, "embedding")), want, atol=1e-4)
