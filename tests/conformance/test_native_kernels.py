"""Guards the native CPU kernels: every instruction-set level that this machine can run, forced one
by one, against the numpy references and against the values that a packed weight stands for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from support.attention_checks import run_case
from support.kernel_checks import cpu_device, rounded_to_bytes, verdict_of
from support.native_forms import FORMS, HERE
from torch import Tensor

from sixfold.common.ops import OPS
from sixfold.common.ops.paging import from_int8_rows, to_int8_rows
from sixfold.common.ops.suite import group_of, step_of
from sixfold.platforms.cpu import native_attention, packing
from sixfold.platforms.cpu.kernels import NATIVE_OPS
from sixfold.platforms.cpu.native_attention import NativeAttention
from sixfold.platforms.cpu.native_library import LEVELS, Team, missing
from sixfold.platforms.cpu.native_ops import Issuer, NativeOps
from sixfold.platforms.cpu.packing import PackedWeight
from sixfold.platforms.interface_attention import AttentionSpec
from sixfold.platforms.interface_kernels import Case, KernelTable
from sixfold.platforms.torch_runtime.conformance import LAYER
from sixfold.platforms.torch_runtime.dtypes import KV_DTYPES
from sixfold.platforms.torch_runtime.pools import TorchKVPool

SHAPES = [(1, 64, 48), (3, 33, 17), (4, 1, 16), (9, 576, 100), (37, 96, 49), (1, 7, 1), (0, 32, 16)]


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
    verdict = verdict_of(OPS[op], getattr(NativeOps(issuer), op))
    assert verdict.status == "pass", verdict


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_on_every_form_of_weight(
    issuer: Issuer, form: Callable[[Tensor], PackedWeight], shape: tuple[int, int, int]
) -> None:
    rows, k, n = shape
    torch.manual_seed(rows + k + n)
    x, bias = torch.randn(rows, k + 3)[:, :k], torch.randn(n)
    if form.__name__ == "_int8_extremes":
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


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_none_spoils_its_row_and_no_other(
    issuer: Issuer, form: Callable[[Tensor], PackedWeight], broken: float
) -> None:
    """Activations of quantised weights are rounded to bytes, which have no NaN."""
    torch.manual_seed(0)
    x, weight = torch.randn(9, 97), form(torch.randn(33, 97))
    linear = NativeOps(issuer).linear
    want = linear(x, weight)
    rows = torch.tensor([0, 4, 8])
    x = x.clone()
    x[rows, torch.tensor([0, 50, 96])] = broken
    got = linear(x, weight)
    assert not got[rows].isfinite().any()
    others = torch.tensor([row for row in range(9) if row not in rows])
    assert torch.equal(got[others], want[others])


@pytest.mark.parametrize("part_keys", [256, 3])
def test_attention_equals_the_reference(
    issuer: Issuer, part_keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 3, rows that decode are cut into parts even where they are short."""
    monkeypatch.setattr(native_attention, "PART_KEYS", part_keys)
    backend = NativeAttention(issuer)
    for case in OPS["attention"].cases(np.random.default_rng(7)):
        got, pool = run_case(backend, case, "float32")
        want = OPS["attention"].reference(**case.args)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5, err_msg=case.name)
        assert bool((pool.data[1 - LAYER] == 7.0).all()), "another layer was touched"


def _as_kept(x: np.ndarray, kv_dtype: str) -> np.ndarray:
    """What a cache of this dtype makes of keys or values."""
    if kv_dtype == "int8":
        return from_int8_rows(to_int8_rows(x))
    return torch.from_numpy(x).to(KV_DTYPES[kv_dtype]).float().numpy()


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float16", "int8"])
def test_attention_on_narrow_keys_and_values(issuer: Issuer, kv_dtype: str) -> None:
    """Equal to the reference on keys and values rounded as the cache rounds them: the oracle knows
    the format, so its own error is not an excuse."""
    backend = NativeAttention(issuer)
    for case in OPS["attention"].cases(np.random.default_rng(11)):
        got, pool = run_case(backend, case, "float32", kv_dtype)
        kept = {name: _as_kept(case.args[name], kv_dtype) for name in ("keys", "values", "k", "v")}
        want = OPS["attention"].reference(**{**case.args, **kept})
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5, err_msg=case.name)
        assert bool((pool.data[1 - LAYER] == 7).all()), "another layer was touched"


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float16"])
def test_numbers_that_a_narrow_cache_can_just_hold(issuer: Issuer, kv_dtype: str) -> None:
    """Written to the cache and read back: subnormals, ties, signs, the largest; beyond fp16's
    largest the largest stands, and NaN stays NaN."""
    dtype = KV_DTYPES[kv_dtype]
    special = torch.tensor(
        [
            0.0,
            -0.0,
            1e-7,
            6e-8,
            2.9e-8,
            -6.1e-5,
            6.097e-5,
            65504.0,
            65519.0,
            1.00048828125,
            1.00146484375,
            -3.140625,
            1e-30,
            2049.0,
            2051.0,
            7.0,
        ]
    )
    k = special.repeat(2).view(1, 1, 32)
    v = torch.cat((torch.tensor([1e6, -1e30, float("nan"), 3.3e38]), torch.randn(28))).view(
        1, 1, 32
    )
    case = Case(
        "special",
        {
            "q": np.zeros((1, 1, 32)),
            "query_start": np.array([0, 1], np.int32),
            "context_lens": np.zeros(1, np.int32),
            "page_table": np.array([[2]], np.int32),
            "keys": np.zeros((12, 1, 32)),
            "page_size": 4,
            "window": 0,
            "tree_mask": None,
        },
    )
    group = group_of(case)
    spec = AttentionSpec(1, 1, 32, 1.0, kv_dtype=kv_dtype)
    backend = NativeAttention(issuer)
    pool = TorchKVPool(group, backend.layout(group, spec, 1), cpu_device(), KernelTable({}, ()))
    pool.data.zero_()
    bound = backend.bind(backend.plan(step_of(case), group))
    backend.run(bound, pool, 0, torch.zeros(1, 1, 32), k, v, spec)
    most = torch.finfo(dtype).max
    for kept, given in zip(pool.tokens[0, 2, 0], (k, v), strict=True):
        want = given[0].clamp(-most, most) if kv_dtype == "float16" else given[0]
        assert torch.equal(kept.nan_to_num(5.0), want.to(dtype).nan_to_num(5.0))


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
