"""Guards the native CPU kernels: every instruction-set level that this machine can run, forced one
by one, against the numpy references and against the values that a packed weight stands for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from support.attention_checks import LAYER, run_case
from support.kernel_checks import check, rounded_to_bytes
from torch import Tensor

from sixfold.common.ops import OPS
from sixfold.platforms.cpu import native_attention, packing
from sixfold.platforms.cpu.kernels import NATIVE_OPS
from sixfold.platforms.cpu.native_attention import NativeAttention
from sixfold.platforms.cpu.native_library import LEVELS, Team, missing, usable_levels
from sixfold.platforms.cpu.native_ops import Issuer, NativeOps
from sixfold.platforms.cpu.packing import PackedWeight
from sixfold.platforms.machine import observe

HERE = usable_levels(observe().cpu_features)
SHAPES = [(1, 64, 48), (3, 33, 17), (4, 1, 16), (9, 576, 100), (37, 96, 49), (1, 7, 1), (0, 32, 16)]


def _bf16(weight: Tensor) -> PackedWeight:
    return packing.pack_floats(weight.bfloat16())


def _f16(weight: Tensor) -> PackedWeight:
    return packing.pack_floats(weight.half())


def _int4_without_minimum(weight: Tensor) -> PackedWeight:
    n, k = weight.shape
    groups = -(-k // packing.GROUP)
    q = torch.randint(0, 16, (n, groups, packing.GROUP))
    return packing.pack_int4(q, torch.rand(n, groups), None, weight.shape)


def _int8_extremes(weight: Tensor) -> PackedWeight:
    """All weights -128, as a file may hold: what a 16-bit sum of two products must survive."""
    n, k = weight.shape
    groups = -(-k // packing.GROUP)
    q = torch.full((n, groups, packing.GROUP), -128)
    return packing.pack_int8(q, torch.rand(n, groups), weight.shape)


def _int8_by_sixteen(weight: Tensor) -> PackedWeight:
    n, k = weight.shape
    groups = -(-k // packing.GROUP)
    q = torch.randint(-128, 128, (n, groups, packing.GROUP))
    return packing.pack_int8(q, torch.rand(n, 2 * groups), weight.shape)


def _int8_with_minimum(weight: Tensor) -> PackedWeight:
    n, k = weight.shape
    groups = -(-k // packing.GROUP)
    q = torch.randint(0, 32, (n, groups, packing.GROUP))
    return packing.pack_int8(q, torch.rand(n, groups), weight.shape, torch.randn(n, groups))


FORMS: list[Callable[[Tensor], PackedWeight]] = [
    packing.pack_floats,
    _bf16,
    _f16,
    packing.quantise_int8,
    _int8_extremes,
    _int8_by_sixteen,
    _int8_with_minimum,
    packing.quantise_int4,
    _int4_without_minimum,
]


def test_this_checkout_has_native_kernels() -> None:
    assert missing() is None
    assert HERE
    assert HERE[-1] == "portable"
    assert [name for name, _ in LEVELS if name in HERE] == HERE


@pytest.fixture(params=[(level, threads) for level in HERE for threads in (1, 3)], ids=str)
def issuer(request: pytest.FixtureRequest) -> Issuer:
    level, threads = request.param
    return Issuer(Team(threads, level))


@pytest.mark.parametrize("op", NATIVE_OPS)
def test_equals_the_reference(issuer: Issuer, op: str) -> None:
    assert check(OPS[op], getattr(NativeOps(issuer), op), "float32") > 0


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_on_every_form_of_weight(
    issuer: Issuer, form: Callable[[Tensor], PackedWeight], shape: tuple[int, int, int]
) -> None:
    rows, k, n = shape
    torch.manual_seed(rows + k + n)
    x, bias = torch.randn(rows, k + 3)[:, :k], torch.randn(n)
    if form is _int8_extremes:
        x = torch.where(x > 0, 1.0, -1.0)
    weight = form(torch.randn(n, k) * k**-0.5)
    values = packing.unpack(weight).double()
    seen = rounded_to_bytes(x) if weight.quantised else x
    want = (seen.double() @ values.T + bias).float()
    got = NativeOps(issuer).linear(x, weight, bias)
    largest = max(1.0, float(values.abs().max()))
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5 * largest)
    if n > 1:
        ids = torch.tensor([n - 1, 0, n // 2])
        torch.testing.assert_close(NativeOps(issuer).embedding(ids, weight), values[ids].float())


@pytest.mark.parametrize("least_keys", [128, 3])
def test_attention_equals_the_reference(
    issuer: Issuer, least_keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 3, rows that decode are cut into parts even where they are short."""
    monkeypatch.setattr(native_attention, "LEAST_KEYS", least_keys)
    backend = NativeAttention(issuer)
    for case in OPS["attention"].cases(np.random.default_rng(7)):
        got, pool = run_case(backend, case, "float32")
        want = OPS["attention"].reference(**case.args)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5, err_msg=case.name)
        assert bool((pool.data[1 - LAYER] == 7.0).all()), "another layer was touched"


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_quantising_keeps_the_weight(bits: str) -> None:
    torch.manual_seed(1)
    weight = torch.randn(50, 70)
    packed = packing.quantise_int8(weight) if bits == "int8" else packing.quantise_int4(weight)
    error = (packing.unpack(packed) - weight).norm() / weight.norm()
    assert error < (0.01 if bits == "int8" else 0.1)
    zeros = torch.zeros(5, 40)
    quantise = packing.quantise_int8 if bits == "int8" else packing.quantise_int4
    assert bool((packing.unpack(quantise(zeros)) == 0).all())


def test_a_team_shared_by_many_small_steps_loses_no_work() -> None:
    """More threads than cores, thousands of runs: a task that is lost or done twice shows."""
    ops = NativeOps(Issuer(Team(5, HERE[0])))
    x = torch.randn(33, 16)
    want = torch.nn.functional.silu(x) * x
    for _ in range(2000):
        torch.testing.assert_close(ops.silu_mul(x, x), want)
