"""Guards how quantised matrices lie for the Triton kernels: the values that they stand for, taken
apart here by the layout's own words; no more memory than the packed form; refusals. No Triton."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.kernel_checks import cpu_device

from sixfold.common.checkpoint.quantised_rows import QuantisedRows
from sixfold.common.errors import KernelError
from sixfold.common.ops.quantised_linear import FORMS, GGUF_FORMS, rows_values
from sixfold.models.quantization import BITS
from sixfold.platforms.interface_kernels import Problem
from sixfold.platforms.torch_runtime.rounding import round_int4, round_int8
from sixfold.platforms.triton_kernels.packed_experts import PackedExperts, outputs, pack_experts
from sixfold.platforms.triton_kernels.packed_matrix import (
    INT4,
    MINIMUMS,
    PLAIN,
    ROUNDED,
    ZEROS,
    PackedMatrix,
    pack,
)

N, K = 6, 384


def rows(bits: int, group: int, zeros: bool, columns: int = K) -> QuantisedRows:
    rng = np.random.default_rng(group)
    count, repeat = -(-columns // group), group // 32
    groups = -(-columns // 32)
    low, high = (0, 16) if bits == 4 else (-128, 128)
    q = rng.integers(low, high, (N, groups, 32)).astype(np.uint8 if bits == 4 else np.int8)
    scale = rng.uniform(0.5, 1.5, (N, count)).astype(np.float16).astype(np.float32)
    zero = rng.integers(low, high, scale.shape).astype(np.float32)
    wide = [np.repeat(part, repeat, axis=1)[:, :groups] for part in (scale, scale * zero)]
    return QuantisedRows(bits, q, wide[0], wide[1] if zeros else None, columns)


def made(weight: Any, op: str = "linear", scheme: str = "gptq_int4") -> PackedMatrix:
    matrix = pack(weight, Problem(op, "bfloat16", {}, scheme), cpu_device())
    assert isinstance(matrix, PackedMatrix)
    return matrix


def values(matrix: PackedMatrix) -> torch.Tensor:
    """Number by number, as the module's first lines say."""
    n, k = matrix.shape
    out = torch.empty(n, k)
    for o in range(n):
        for i in range(k):
            if matrix.form == INT4:
                byte = int(matrix.data[o, i // 32 * 16 + i % 16])
                number = float(byte % 16 if i % 32 < 16 else byte // 16)
            else:
                number = float(matrix.data[o, i])
            group = i // matrix.group if matrix.group else 0
            scale = float(matrix.scales[group, o])
            shift = 0.0 if matrix.shifts is None else float(matrix.shifts[group, o])
            if matrix.shift == PLAIN:
                shift = 8.0 if matrix.form == INT4 else 0.0
            minimum = shift if matrix.shift == MINIMUMS else scale * shift
            out[o, i] = scale * number - minimum
    return out


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("group", "found"), [(32, 32), (64, 64), (96, 32), (128, 128), (K, 0)], ids=str
)
def test_it_stands_for_the_same_values(bits: int, group: int, found: int, zeros: bool) -> None:
    stored = rows(bits, group, zeros)
    matrix = made(stored)
    assert (matrix.group, matrix.shift) == (found, ZEROS if zeros else PLAIN)
    want = torch.from_numpy(rows_values(stored))
    torch.testing.assert_close(values(matrix), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("columns", [7, 70, 100])
def test_a_last_group_may_be_short(columns: int) -> None:
    stored = rows(4, 32, True, columns)
    matrix = made(stored)
    assert matrix.data.shape == (N, -(-columns // 32) * 16)
    torch.testing.assert_close(values(matrix), torch.from_numpy(rows_values(stored)))


@pytest.mark.parametrize(
    ("bits", "group", "zeros", "bits_a_weight"),
    [(4, 128, False, 4 + 16 / 128), (4, 128, True, 4 + 24 / 128), (8, K, False, 8 + 16 / K)],
)
def test_it_takes_no_more_than_the_packed_form(
    bits: int, group: int, zeros: bool, bits_a_weight: float
) -> None:
    """A scale in 16 bits and, where there is one, a zero of a byte per group."""
    assert made(rows(bits, group, zeros)).nbytes == N * K * bits_a_weight / 8


def test_minimums_that_are_no_products_stay_as_they_are() -> None:
    stored = FORMS["awq_int4"](np.random.default_rng(1), N, K)
    matrix = made(stored)
    assert matrix.shift == MINIMUMS
    torch.testing.assert_close(values(matrix), torch.from_numpy(rows_values(stored)))


def test_a_scale_of_zero_keeps_its_minimum() -> None:
    stored = rows(4, 32, True)
    scale, minimum = stored.scale.copy(), stored.minimum.copy()
    scale[2, 3] = 0.0
    minimum[2, 3] = 0.5
    matrix = made(replace(stored, scale=scale, minimum=minimum))
    assert matrix.shift == MINIMUMS
    assert torch.equal(values(matrix)[2, 96:128], torch.full((32,), -0.5))


def test_scales_are_halved_only_where_that_loses_nothing() -> None:
    stored = rows(8, 64, False)
    for step, dtype in ((1.0, torch.float16), (2.0**30, torch.bfloat16), (1.1, torch.float32)):
        base = np.full_like(stored.scale, 1.5)
        kept = made(replace(stored, scale=base * np.float32(step))).scales
        assert kept.dtype == dtype
        assert torch.equal(kept.float(), torch.full_like(kept, 1.5).float() * step)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_tensor_is_rounded_as_everywhere(scheme: str) -> None:
    weight = torch.randn(5, 70, generator=torch.Generator().manual_seed(0))
    parts = round_int8(weight) if scheme == "int8" else round_int4(weight)
    wide = parts[0] * parts[1].float()[..., None]
    if scheme == "int4":
        wide = wide - parts[2].float()[..., None]
    got = values(made(weight, scheme=scheme))
    torch.testing.assert_close(got, wide.flatten(1)[:, :70])
    step = weight.abs().max() / (127 if scheme == "int8" else 7)
    assert (got - weight).abs().max() < step


def test_a_matrix_without_a_scheme_is_left_alone() -> None:
    weight = torch.randn(4, 32)
    assert pack(weight, Problem("linear", "bfloat16"), cpu_device()) is weight


def test_refusals() -> None:
    turned = replace(rows(4, 32, False), order=np.arange(K)[::-1].astype(np.int64))
    assert made(turned).order is not None
    with pytest.raises(KernelError, match="embedding with columns out of order"):
        made(turned, "embedding")
    stack = Problem("moe_experts", "bfloat16", {"parts": 1}, "gptq_int4")
    with pytest.raises(KernelError, match="desc_act"):
        pack_experts([turned, turned], stack, cpu_device())


@pytest.mark.parametrize("scheme", GGUF_FORMS)
def test_forms_of_gguf_keep_their_values_and_the_bits_that_are_planned(scheme: str) -> None:
    """Rounded to float16 are scales and minimums of the k forms alone."""
    stored = GGUF_FORMS[scheme](np.random.default_rng(2), N, K)
    matrix = made(stored, scheme=scheme)
    want = torch.from_numpy(rows_values(stored))
    error = (values(matrix) - want).abs().max() / want.abs().max()
    assert error < (1e-3 if scheme in ROUNDED else 1e-6)
    assert matrix.nbytes <= N * K * BITS[scheme] / 8


def stored_experts(scheme: str, minimums: bool = False) -> list[Any]:
    rng = np.random.default_rng(4)
    found = [FORMS[scheme](rng, N, K) for _ in range(4)]
    if minimums:
        found[2] = replace(found[2], minimum=found[2].scale * 3)
    return found


@pytest.mark.parametrize(("scheme", "minimums"), [("int8_channel", False), ("packed_int4", True)])
def test_a_stack_is_its_matrices_below_each_other(scheme: str, minimums: bool) -> None:
    """One of them with minimums of its own."""
    matrices = stored_experts(scheme, minimums)
    problem = Problem("moe_experts", "bfloat16", {"parts": 2}, scheme)
    stack = pack_experts(iter(matrices), problem, cpu_device())
    assert isinstance(stack, PackedExperts)
    assert (stack.count, outputs(stack, 2)) == (4, N)
    want = np.concatenate([rows_values(matrix) for matrix in matrices])
    torch.testing.assert_close(values(stack.matrix), torch.from_numpy(want), rtol=1e-6, atol=1e-6)


def test_a_stack_of_floats_is_rounded_matrix_by_matrix() -> None:
    weights = torch.randn(3, 2 * N, 70, generator=torch.Generator().manual_seed(0))
    problem = Problem("moe", "bfloat16", {"parts": 2}, "int8")
    stack = pack_experts(weights, problem, cpu_device())
    assert isinstance(stack, PackedExperts)
    assert stack.count == 6
    one = made(weights[1, N:].contiguous(), scheme="int8")
    torch.testing.assert_close(values(stack.matrix)[3 * N : 4 * N], values(one))
    plain = Problem("moe", "bfloat16", {"parts": 2})
    assert pack_experts(weights, plain, cpu_device()) is weights
