"""Guards native mixtures of experts: every level and number of threads, experts in every form of
weight, against the numpy reference on the values that a packed weight stands for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from support.kernel_checks import rounded_to_bytes
from support.native_forms import FORMS, HERE
from torch import Tensor

from sixfold.common.errors import KernelError
from sixfold.common.ops.moe import moe
from sixfold.platforms.cpu import packing
from sixfold.platforms.cpu.native_library import Team
from sixfold.platforms.cpu.native_ops import Issuer, NativeOps
from sixfold.platforms.cpu.packed_experts import PackedExperts, dismantle, join, restore
from sixfold.platforms.cpu.packing import PackedWeight

Form = Callable[[Tensor], PackedWeight]


@dataclass(frozen=True)
class Sizes:
    rows: int
    width: int
    inner: int
    experts: int
    top_k: int


SIZES = [
    Sizes(1, 64, 48, 12, 8),
    Sizes(9, 33, 17, 5, 1),
    Sizes(40, 96, 40, 6, 2),  # more rows of one expert than are gathered at a time
    Sizes(3, 70, 100, 16, 8),
]


@pytest.fixture(params=[(level, threads) for level in HERE for threads in (1, 3)], ids=str)
def issuer(request: pytest.FixtureRequest) -> Issuer:
    level, threads = request.param
    return Issuer(Team(threads, level))


def stacks(form: Form, s: Sizes) -> tuple[PackedExperts, PackedExperts, Tensor, Tensor]:
    """Packed, and the values: gate_up (experts, 2 inner, width), down (experts, width, inner)."""
    torch.manual_seed(s.rows + s.inner)
    matrices = [torch.randn(s.inner, s.width) * s.width**-0.5 for _ in range(2 * s.experts)]
    ups = [form(m) for m in matrices]
    downs = [form(torch.randn(s.width, s.inner) * s.inner**-0.5) for _ in range(s.experts)]
    gate_up = torch.stack([packing.unpack(w) for w in ups]).view(s.experts, -1, s.width)
    return join(ups), join(downs), gate_up, torch.stack([packing.unpack(w) for w in downs])


def expected(x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor, s: Sizes) -> Tensor:
    """The reference on activations rounded twice, as the kernel rounds them."""
    weights = torch.softmax(logits.double(), -1)
    factors, chosen = weights.topk(s.top_k)
    factors = factors / factors.sum(-1, keepdim=True)
    total = torch.zeros(len(x), s.width, dtype=torch.float64)
    x = rounded_to_bytes(x).double()
    for row, expert, factor in zip(range(len(x)), chosen.tolist(), factors.tolist(), strict=True):
        for e, f in zip(expert, factor, strict=True):
            gate, up = (gate_up[e].double() @ x[row]).chunk(2)
            hidden = (torch.nn.functional.silu(gate) * up).float()[None]
            # A step of a 127th of what float32 can just hold is none.
            hidden = rounded_to_bytes(torch.where(hidden.abs() > 1e-30, hidden, 0.0))
            total[row] += f * (down[e].double() @ hidden[0].double())
    return total.float()


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_form_of_weight(issuer: Issuer, form: Form, sizes: Sizes) -> None:
    ups, downs, gate_up, down = stacks(form, sizes)
    x, logits = torch.randn(sizes.rows, sizes.width), torch.randn(sizes.rows, sizes.experts)
    got = NativeOps(issuer).moe(x, logits, ups, downs, sizes.top_k, True)
    if ups.quantised:
        # A hidden number next to a rounding edge may go the other way: one step of 1/254.
        want, slack = expected(x, logits, gate_up, down, sizes), 4e-3
    else:
        arrays = (t.numpy() for t in (x, logits, gate_up, down))
        want, slack = torch.from_numpy(moe(*arrays, sizes.top_k, True)), 2e-5
    torch.testing.assert_close(got, want, rtol=0, atol=slack * float(want.abs().max()) + 2e-5)


@pytest.mark.parametrize("favourite", [0, 3])
def test_all_rows_to_one_expert_and_none_to_another(issuer: Issuer, favourite: int) -> None:
    s = Sizes(50, 48, 32, 4, 2)
    ups, downs, gate_up, down = stacks(packing.pack_floats, s)
    x, logits = torch.randn(s.rows, s.width), torch.randn(s.rows, s.experts)
    logits[:, favourite] += 50
    logits[:, 2] = -50
    for top_k in (1, 2):
        got = NativeOps(issuer).moe(x, logits, ups, downs, top_k, False)
        want = moe(*(t.numpy() for t in (x, logits, gate_up, down)), top_k, False)
        np.testing.assert_allclose(got.numpy(), want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("form", [packing.pack_floats, packing.quantise_int8])
def test_a_row_is_the_same_in_any_batch(issuer: Issuer, form: Form) -> None:
    s = Sizes(33, 64, 48, 8, 3)
    ups, downs, _, _ = stacks(form, s)
    x, logits = torch.randn(s.rows, s.width), torch.randn(s.rows, s.experts)
    ops = NativeOps(issuer)

    def run(first: int, last: int) -> Tensor:
        part = slice(first, last)
        return ops.moe(x[part].clone(), logits[part].clone(), ups, downs, s.top_k, True)

    alone = torch.cat([run(row, row + 1) for row in range(s.rows)])
    for batch in (2, 7, s.rows):
        assert torch.equal(run(0, batch), alone[:batch])


def test_rows_without_numbers_harm_no_other_row(issuer: Issuer) -> None:
    s = Sizes(4, 32, 16, 4, 2)
    ups, downs, _, _ = stacks(packing.pack_floats, s)
    x, logits = torch.randn(s.rows, s.width), torch.randn(s.rows, s.experts)
    want = NativeOps(issuer).moe(x, logits, ups, downs, s.top_k, True)
    broken = logits.clone()
    broken[1] = float("nan")
    got = NativeOps(issuer).moe(x, broken, ups, downs, s.top_k, True)
    assert bool(got[1].isnan().all())
    assert torch.equal(got[[0, 2, 3]], want[[0, 2, 3]])


def test_some_experts_with_minimums_and_some_without(issuer: Issuer) -> None:
    """As a file may give them: the stack takes one form and every number stays."""
    torch.manual_seed(0)
    q, scale, minimum = torch.randint(0, 16, (20, 2, 32)), torch.rand(20, 2), torch.rand(20, 2)
    plain = packing.pack_int4(q, scale, None, (20, 50))
    both = [plain, packing.pack_int4(q, scale, minimum, (20, 50))]
    stack = join(both).stack
    values = packing.unpack(stack).view(2, 32, 50)[:, :20]
    for got, matrix in zip(values, both, strict=True):
        torch.testing.assert_close(got, packing.unpack(matrix), rtol=0, atol=0.01)


def test_a_stack_is_taken_apart_and_made_again(issuer: Issuer) -> None:
    s = SIZES[2]
    ups, downs, _, _ = stacks(packing.quantise_int4, s)
    x, logits = torch.randn(s.rows, s.width), torch.randn(s.rows, s.experts)
    again = [restore(*dismantle(stack)) for stack in (ups, downs)]
    ops = NativeOps(issuer)
    want = ops.moe(x, logits, ups, downs, s.top_k, True)
    assert torch.equal(ops.moe(x, logits, *again, s.top_k, True), want)


def test_columns_out_of_order_are_refused() -> None:
    matrix = packing.pack_floats(torch.randn(16, 32))
    turned = PackedWeight(matrix.format, matrix.shape, matrix.data, order=torch.arange(32))
    with pytest.raises(KernelError, match="out of order"):
        join([matrix, turned])
