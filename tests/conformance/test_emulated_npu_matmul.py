"""Guards the npu platform's products (stored integers, experts) against the contracts of `linear`
and `moe`, over the emulator of torch_npu; and each trap of their pages: strided weights, biases of
one axis, groups that the op refuses. Evidence of the kind "emulated"."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.emulated_npu import NPUError, module
from support.emulated_npu.platform import PLATFORM, EmulatedDevice, facts

from sixfold.common.errors import KernelError
from sixfold.common.ops import OPS
from sixfold.common.ops.conformance import check_op, run_suite
from sixfold.common.ops.quantised_linear import awq_int4, int8_channel, packed_int4, rows_values
from sixfold.platforms.interface_kernels import Problem
from sixfold.platforms.npu import experts, quantised
from sixfold.platforms.torch_runtime.rounding import in_groups, round_int8

OURS = ("torch_npu",)


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> Any:
    torch.set_num_threads(1)
    emulator = module()
    monkeypatch.setitem(sys.modules, "torch_npu", emulator)
    monkeypatch.setattr(sys.modules[PLATFORM.__module__], "module", lambda: emulator)
    return emulator


def verdicts(title: str) -> dict[str, Any]:
    subjects = PLATFORM.conformance(None).subjects
    ours = [s for s in subjects if s.op == title and s.provider in OURS]
    return {v.provider: v for v in check_op(OPS[title], ours)}


@pytest.mark.parametrize(
    ("title", "provider"),
    [
        ("linear/int8_channel", "torch_npu"),
        ("linear/int8_token", "torch_npu"),
        ("linear/packed_int4", "torch_npu"),
        ("linear/awq_int4", "torch_npu"),
        ("moe", "torch_npu"),
        ("moe_experts", "torch_npu"),
    ],
)
def test_every_kernel_equals_its_reference(title: str, provider: str) -> None:
    verdict = verdicts(title)[provider]
    assert (verdict.status, verdict.failures) == ("pass", [])


def matrix(form: Callable[..., Any], dtype: str, n: int = 24, k: int = 96, **change: Any) -> Any:
    rows = replace(form(np.random.default_rng(5), n, k), **change)
    problem = Problem("linear", dtype, {"k": k, "n": n}, form.__name__)
    return quantised.prepare(rows, problem, EmulatedDevice(facts()))


def test_scales_per_output_are_exact_in_bfloat16() -> None:
    """bfloat16 has none of them; what it rounds is multiplied into the result."""
    made = matrix(int8_channel, "bfloat16")
    rows = int8_channel(np.random.default_rng(5), 24, 96)
    scale = (made.scale[0, 0].float() * made.rest).numpy()
    np.testing.assert_array_equal(scale, rows.scale[:, 0])
    assert not np.array_equal(made.scale[0, 0].float().numpy(), rows.scale[:, 0])


def test_scales_of_groups_that_bfloat16_rounds_are_refused() -> None:
    with pytest.raises(KernelError, match=r"scales of groups in torch\.bfloat16"):
        matrix(packed_int4, "bfloat16")


def test_minimums_that_are_no_zeros_are_refused() -> None:
    rows = awq_int4(np.random.default_rng(5), 24, 96)
    assert rows.minimum is not None
    with pytest.raises(KernelError, match="minimums that are not zeros"):
        matrix(awq_int4, "float16", minimum=rows.minimum + 0.4 * rows.scale)


@pytest.mark.parametrize(
    ("dtype", "dims", "weights", "reason"),
    [
        ("float32", {}, "int8_channel", "takes float16 and bfloat16"),
        ("bfloat16", {}, "packed_int4", "--dtype float16 keeps them"),
        ("float16", {"n": 64, "k": 65536}, "int8_channel", "k is up to 65535"),
        ("float16", {}, "mxfp4", "has no mxfp4 weights"),
    ],
)
def test_what_the_op_does_not_take_is_refused(
    dtype: str, dims: dict[str, int], weights: str, reason: str
) -> None:
    for kernel in quantised.kernels(EmulatedDevice(facts())):
        found = kernel.requires(facts(), Problem("linear", dtype, dims, weights))
        assert found is not None
        assert reason in found or found == f"has no {weights} weights"


@pytest.mark.parametrize(
    ("dims", "reason"),
    [({"experts": 1025}, "up to 1024 experts"), ({"n": 40000, "k": 8}, "sides below 65536")],
)
def test_stacks_that_the_op_does_not_take_are_refused(dims: dict[str, int], reason: str) -> None:
    for kernel in experts.KERNELS:
        assert reason in str(kernel.requires(facts(), Problem(kernel.op, "bfloat16", dims)))


# ---- rounded on load


def rounded(dtype: str, n: int, k: int, op: str = "linear") -> tuple[torch.Tensor, Any]:
    """(the numbers that a matrix of n by k is rounded to, its form here)."""
    kind = getattr(torch, dtype)
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(3)).to(kind)
    q, scale = round_int8(weight, kind)
    values = (q * scale.float().unsqueeze(-1)).flatten(1)[:, :k]
    problem = Problem(op, dtype, {"k": k, "n": n}, "int8")
    return values, quantised.prepare(weight, problem, EmulatedDevice(facts()))


@pytest.mark.parametrize(("dtype", "near"), [("float16", 2e-3), ("bfloat16", 2e-2)])
@pytest.mark.parametrize(("n", "k"), [(33, 96), (5, 32), (17, 70), (3, 7)])
def test_a_matrix_rounded_on_load_has_the_scales_of_its_dtype(
    n: int, k: int, dtype: str, near: float
) -> None:
    """In float16 those of every other platform."""
    values, made = rounded(dtype, n, k)
    x = torch.randn(4, k).to(getattr(torch, dtype))
    want = x.float() @ values.t()
    torch.testing.assert_close(quantised.linear(x, made).float(), want, rtol=near, atol=10 * near)
    plain = torch.randn(n, k, generator=torch.Generator().manual_seed(3)).to(x.dtype).float()
    largest = in_groups(plain).abs().amax(-1, keepdim=True).expand(-1, -1, 32).flatten(1)[:, :k]
    assert ((values - plain).abs() <= 0.51 / 127 * largest).all()


@pytest.mark.parametrize(("n", "k"), [(33, 96), (5, 32), (17, 70)])
def test_rows_of_a_rounded_embedding_are_its_numbers(n: int, k: int) -> None:
    """In the form that a head has which shares the matrix."""
    values, made = rounded("float16", n, k, "embedding")
    ids = torch.tensor([0, n - 1, 2, 2])
    assert torch.equal(quantised.embedding(ids, made, 2.0), (2 * values[ids]).half())
    assert quantised.embedding(ids[:0], made).shape == (0, k)
    plain = torch.randn(5, 8, dtype=torch.float16)
    assert torch.equal(quantised.embedding(torch.tensor([4]), plain), plain[4:])


WIDE, NARROW = 151_936, 32
"""Outputs of Qwen's heads, which the op takes in three calls, and a width that is soon made."""


@pytest.fixture(scope="module")
def head() -> tuple[torch.Tensor, torch.Tensor, Any]:
    """(a tied head in float16, the numbers it is rounded to, its form here)"""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(WIDE, NARROW, generator=generator).half()
    q, scale = round_int8(weight)
    values = (q * scale.float().unsqueeze(-1)).flatten(1)
    problem = Problem("linear", "float16", {"k": NARROW, "n": WIDE}, "int8")
    return weight, values, quantised.prepare(weight, problem, EmulatedDevice(facts()))


def test_a_head_of_more_outputs_than_the_op_takes_is_cut(head: Any, library: Any) -> None:
    """Each output at its place, the ones beside the cuts too; a bias besides."""
    _, values, made = head
    assert tuple(made.weight.shape) == (3, NARROW, 50_646)
    x, bias = torch.randn(2, NARROW).half(), torch.randn(WIDE).half()
    want = x.float() @ values.t()
    got = quantised.linear(x, made)
    assert got.shape == (2, WIDE)
    torch.testing.assert_close(got.float(), want, rtol=2e-3, atol=2e-2)
    more = quantised.linear(x, made, bias).float()
    torch.testing.assert_close(more, want + bias.float(), rtol=2e-3, atol=2e-2)
    whole = made.weight.transpose(1, 2).flatten(0, 1)[:WIDE].t()
    with pytest.raises(NPUError, match="K and N are up to 65535"):
        library.npu_weight_quant_batchmatmul(x, whole, made.scale[0, :, :1])


def test_ids_beyond_a_cut_find_their_rows(head: Any) -> None:
    _, values, made = head
    n = made.scale.shape[2]
    ids = torch.tensor([0, n - 1, n, 2 * n - 1, 2 * n, WIDE - 1])
    assert torch.equal(quantised.embedding(ids, made), values[ids].half())


@pytest.mark.parametrize("form", [packed_int4, int8_channel])
def test_other_forms_are_cut_too(
    form: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, library: Any
) -> None:
    """Down to a limit of 20 outputs, of four bits a multiple of eight."""
    monkeypatch.setattr(quantised, "WIDEST", 20)
    made = matrix(form, "float16", 45, 96)
    assert made.scale.shape[::2] == (3, 16 if form is packed_int4 else 15)
    x = torch.randn(4, 96).half()
    values = torch.from_numpy(rows_values(form(np.random.default_rng(5), 45, 96)))
    torch.testing.assert_close(
        quantised.linear(x, made).float(), x.float() @ values.t(), rtol=4e-3, atol=2e-2
    )


def test_parts_in_another_order_are_caught(head: Any) -> None:
    _, values, made = head
    turned = replace(made, weight=made.weight.flip(0))
    x = torch.randn(2, NARROW).half()
    assert not torch.allclose(quantised.linear(x, turned).float(), x.float() @ values.t(), 0.1, 0.1)


def test_steps_of_the_next_group_are_caught() -> None:
    values, made = rounded("float16", 33, 96)
    shifted = replace(made, scale=made.scale.roll(1, 1))
    ids = torch.arange(33)
    assert not torch.equal(quantised.embedding(ids, shifted), values.half())


@pytest.mark.parametrize("op", ["linear", "embedding"])
def test_four_bits_made_on_load_are_refused(op: str) -> None:
    kernel = next(k for k in quantised.kernels(EmulatedDevice(facts())) if k.op == op)
    for dtype in ("float16", "bfloat16"):
        assert kernel.requires(facts(), Problem(op, dtype, {}, "int8")) is None
        assert "has no int4" in str(kernel.requires(facts(), Problem(op, dtype, {}, "int4")))


# ---- traps of the pages


def test_strided_weights_are_refused(library: Any) -> None:
    x = torch.ones(2, 32, dtype=torch.float16)
    strided = torch.ones(32, 48, dtype=torch.int8)[:, :24]
    scale = torch.ones(1, 24, dtype=torch.float16)
    with pytest.raises(NPUError, match="weight is neither contiguous"):
        library.npu_weight_quant_batchmatmul(x, strided, scale)
    with pytest.raises(NPUError, match="x2 is neither contiguous"):
        library.npu_quant_matmul(
            x.to(torch.int8), strided, torch.ones(24), pertoken_scale=torch.ones(2),
            output_dtype=torch.float16,
        )  # fmt: skip
    stack = torch.ones(3, 32, 48, dtype=torch.float16)[..., :24]
    with pytest.raises(NPUError, match="weight is neither contiguous"):
        grouped(library, x, stack, [1, 2, 2])
    library.npu_weight_quant_batchmatmul(x, strided.t().contiguous().t(), scale)


def grouped(library: Any, x: Any, stack: Any, ends: list[int], **given: Any) -> Any:
    counts = torch.tensor(ends)
    return library.npu_grouped_matmul(
        [x], [stack], group_list=counts, split_item=3, group_type=0, **given
    )


def test_biases_have_one_axis(library: Any) -> None:
    x, weight = torch.ones(2, 32, dtype=torch.int8), torch.ones(32, 24, dtype=torch.int8)
    with pytest.raises(NPUError, match=r"bias is \(24,\), not \(1, 24\)"):
        library.npu_quant_matmul(
            x, weight, torch.ones(24), pertoken_scale=torch.ones(2), bias=torch.ones(1, 24),
            output_dtype=torch.float16,
        )  # fmt: skip
    stack, halves = torch.ones(3, 32, 24).half(), torch.ones(2, 32).half()
    with pytest.raises(NPUError, match="it would need two"):
        grouped(library, halves, stack, [1, 2, 2], bias=[torch.ones(3, 24).half()])
    wide = torch.ones(2, 32, dtype=torch.bfloat16)
    scale = torch.ones(1, 24, dtype=torch.bfloat16)
    with pytest.raises(NPUError, match=r"bias is torch\.bfloat16"):
        library.npu_weight_quant_batchmatmul(wide, weight, scale, bias=scale[0])


@pytest.mark.parametrize("size", [16, 48, 64, 96])
def test_groups_that_the_op_refuses(size: int, library: Any) -> None:
    x, weight = torch.ones(2, 64).half(), torch.ones(64, 24, dtype=torch.int8)
    with pytest.raises(NPUError, match="a group is a multiple of 32 from 32 to K - 1 = 63"):
        library.npu_weight_quant_batchmatmul(
            x, weight, torch.ones(-(-64 // size), 24).half(), antiquant_group_size=size
        )


@pytest.mark.parametrize("ends", [[1, 2, 3], [2, 1, 2], [0, 1, 1]])
def test_counts_that_do_not_cover_the_rows_are_refused(ends: list[int], library: Any) -> None:
    with pytest.raises(NPUError, match="group_list"):
        grouped(library, torch.ones(2, 32).half(), torch.ones(3, 32, 24).half(), ends)


# ---- faults


def numbers_in_another_order(library: Any) -> str:
    op = library.npu_convert_weight_to_int4pack
    library.npu_convert_weight_to_int4pack = lambda w: op(w.flip(1).contiguous())
    return "linear/packed_int4"


def offset_of_the_wrong_sign(library: Any) -> str:
    op = library.npu_weight_quant_batchmatmul

    def faulty(x: Any, weight: Any, scale: Any, offset: Any, **given: Any) -> Any:
        return op(x, weight, scale, None if offset is None else -offset, **given)

    library.npu_weight_quant_batchmatmul = faulty
    return "linear/awq_int4"


def counts_shifted_by_an_expert(library: Any) -> str:
    op = library.npu_grouped_matmul

    def faulty(x: Any, weight: Any, group_list: Any, **given: Any) -> Any:
        late = torch.cat((group_list[:1] * 0, group_list[:-1]))
        late[-1] = group_list[-1]
        return op(x, weight, group_list=late, **given)

    library.npu_grouped_matmul = faulty
    return "moe_experts"


@pytest.mark.parametrize(
    "fault",
    [
        numbers_in_another_order,
        offset_of_the_wrong_sign,
        counts_shifted_by_an_expert,
    ],
)
def test_a_fault_is_caught(fault: Callable[[Any], str], library: Any) -> None:
    title = fault(library)
    assert "fail" in {verdict.status for verdict in verdicts(title).values()}


def test_the_matrix_has_no_blank() -> None:
    """`sixfold check` under emulation: each cell passes or says why not, and each contract passes
    by some kernel, the library's or a generic one. `paged_attention` is of Metal's kernels, a cache
    in eight bits is not the library's; GGUF's blocks and quantised experts are converted at load.
    """
    matrix = run_suite(PLATFORM.conformance(None), OPS, lambda title: None)
    assert {verdict.status for verdict in matrix} == {"pass", "unsupported"}
    for verdict in matrix:
        assert verdict.status == "pass" or all(verdict.refused)
        assert verdict.executed or verdict.refused
    passed = {verdict.op for verdict in matrix if verdict.status == "pass"}
    converted = {op for op in OPS if op.startswith(("linear/q", "moe_experts/"))}
    assert set(OPS) - passed - converted == {"paged_attention", "attention/int8"}
