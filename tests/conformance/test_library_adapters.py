"""Guards the adapters to vendors' libraries (FlashInfer, aiter, torch's eight-bit products) against
the contracts of their ops, with stand-ins behind the libraries' real parameters: what is passed is
what the library takes, and means what the contract says. The libraries' kernels do not run here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.attention_checks import run_case
from support.kernel_checks import cpu_device, cpu_facts, verdict_of
from support.library_stand_ins import install

from sixfold.common.errors import KernelError
from sixfold.common.ops import OPS
from sixfold.common.ops.conformance import round_case
from sixfold.common.ops.suite import group_of, step_of
from sixfold.platforms.cuda.flashinfer_attention import FlashInferAttention
from sixfold.platforms.interface_attention import AttentionSpec
from sixfold.platforms.interface_kernels import Problem
from sixfold.platforms.interface_kv import KVGroup, KVKind
from sixfold.platforms.rocm import aiter_norm
from sixfold.platforms.rocm.aiter_attention import AiterAttention
from sixfold.platforms.torch_runtime import paged_rows, scaled_linear

OP = OPS["attention"]
CASES = list(OP.cases(np.random.default_rng(7)))
PLAIN = [case for case in CASES if case.args["sinks"] is None]
POWERS = [case for case in CASES if case.args["page_size"] >= 16]


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    install(monkeypatch)


class AnyFlashInfer(FlashInferAttention):
    """Of a device that has the library, for the heads of the cases."""

    def accepts(self, spec: Any, facts: Any) -> tuple[str, ...]:
        return ()


class AnyAiter(AiterAttention):
    def accepts(self, spec: Any, facts: Any) -> tuple[str, ...]:
        return ()


def close(got: np.ndarray, case: Any, dtype: str = "float16") -> None:
    tolerance = OP.tolerance[dtype]
    want = OP.reference(**case.args)
    np.testing.assert_allclose(got, want, rtol=tolerance.rtol, atol=tolerance.atol)


@pytest.mark.parametrize("case", PLAIN, ids=lambda c: c.name)
def test_flashinfer_equals_the_reference(case: Any) -> None:
    case = round_case(OP, case, "float16")
    close(run_case(AnyFlashInfer(cpu_device()), case, "float16")[0], case)


@pytest.mark.parametrize("case", POWERS, ids=lambda c: c.name)
def test_aiter_equals_the_reference(case: Any) -> None:
    case = round_case(OP, case, "float16")
    close(run_case(AnyAiter(cpu_device()), case, "float16")[0], case)


@pytest.mark.parametrize("backend", [AnyFlashInfer, AnyAiter])
def test_reserved_buffers_take_plan_after_plan(backend: Any) -> None:
    """A bucket of eight rows, then plans of other rows: what it gives is what fresh buffers give;
    rows too many read the null page."""
    device = cpu_device()
    cases = [c for c in PLAIN if c.name in ("decode_page_boundary", "decode_unlike_lengths")]

    class Bucket(backend):  # type: ignore[misc]
        def bind(self, plan: Any, reserved: Any = None) -> Any:
            pages = replace(group_of(cases[0]), pages=64)
            self.room = self.reserve(pages, 8, 8, 320)
            for other in cases:
                super().bind(self.plan(step_of(other), pages), self.room)
            return super().bind(plan, self.room)

        def run(self, bound: Any, pool: Any, layer: int, q: Any, k: Any, v: Any, *rest: Any) -> Any:
            wide = [torch.cat((x, x.new_zeros(8 - len(x), *x.shape[1:]))) for x in (q, k, v)]
            pool.tokens[:, 0] = 0.0
            return super().run(bound, pool, layer, *wide, *rest)[: len(q)]

    for case in cases:
        rounded = round_case(OP, case, "float16")
        close(run_case(Bucket(device), rounded, "float16")[0], rounded)


@pytest.mark.parametrize("backend", [AnyFlashInfer, AnyAiter])
def test_only_decode_steps_are_reserved_for(backend: Any) -> None:
    made = backend(cpu_device())
    prefill = next(c for c in CASES if c.name == "prefill_two")
    group = group_of(prefill)
    made.layout(group, AttentionSpec(4, 2, 64, 1.0, dtype="float16"), 1)
    with pytest.raises(KernelError, match="decode only"):
        made.reserve(group, 4, 9, 100)
    plan = made.plan(step_of(prefill), group)
    with pytest.raises(KernelError, match="2 rows and 38 tokens does not fit"):
        plan.padded(4)


def test_aiter_refuses_pages_that_its_kernels_cannot_read() -> None:
    with pytest.raises(KernelError, match="power of two of tokens, 16 or more, not 24"):
        AnyAiter(cpu_device()).layout(
            KVGroup("g", KVKind.FULL, 24, 8), AttentionSpec(4, 2, 64, 1.0), 1
        )


# ---- faults in what is handed over


def _wider(self: Any, wrapper: Any, plan: Any, spec: Any) -> None:
    start, pages, last = (torch.from_numpy(part) for part in plan.page_list())
    sizes = (spec.heads, spec.kv_heads, spec.head_dim, plan.group.page_size)
    options = {"sm_scale": spec.scale, "window_left": spec.window, "logits_soft_cap": 0.0}
    if plan.decodes:
        wrapper.plan(start, pages, last, *sizes, **options)
    else:
        query = torch.from_numpy(plan.query_start)
        wrapper.plan(query, start, pages, last, *sizes, causal=True, **options)


def test_a_window_one_wider_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FlashInferAttention, "_plan", _wider)
    case = round_case(OP, next(c for c in CASES if c.name == "window_chunk"), "float16")
    with pytest.raises(AssertionError):
        close(run_case(AnyFlashInfer(cpu_device()), case, "float16")[0], case)


@pytest.mark.parametrize("backend", [AnyFlashInfer, AnyAiter])
def test_pages_before_the_window_are_caught(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Listed from the row's beginning, a released page (here: the null page, NaN) is multiplied."""

    def from_the_beginning(batch: Any, group: KVGroup) -> Any:
        whole = KVGroup(group.name, KVKind.FULL, group.page_size, group.pages)
        return paged_rows.plan_rows(batch, whole)

    module = backend.__mro__[1].__module__
    monkeypatch.setattr(f"{module}.plan_rows", from_the_beginning)
    case = round_case(OP, next(c for c in CASES if c.name == "window_decode"), "float16")
    with pytest.raises(AssertionError):
        close(run_case(backend(cpu_device()), case, "float16")[0], case)


# ---- norms and products


@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_aiter_norms_equal_the_reference(op: str, dtype: str) -> None:
    verdict = verdict_of(OPS[op], getattr(aiter_norm, op), dtype)
    assert (verdict.status, verdict.failures) == ("pass", [])


def fp8_matrix(weight: torch.Tensor, fp8: str = "ocp") -> Any:
    facts = cpu_facts(fp8=fp8)
    kernel = scaled_linear.scaled_linear(facts, lambda facts, problem: None)
    outputs, inputs = weight.shape
    problem = Problem("linear", "bfloat16", {"k": inputs, "n": outputs}, "fp8")
    assert kernel.requires(facts, problem) is None
    assert kernel.prepare is not None
    return kernel.prepare(weight, problem)


@pytest.mark.parametrize("rows", [1, 2, 17, 64])
@pytest.mark.parametrize("bias", [False, True])
def test_scaled_products_are_those_of_the_rounded_numbers(rows: int, bias: bool) -> None:
    """Exactly what E4M3 keeps of both sides, with float32 sums; rows of zeros and of unlike size
    keep their own scale."""
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(48, 64, generator=generator).bfloat16()
    weight[5], weight[6] = 0, weight[6] * 300
    x = torch.randn(rows, 64, generator=generator).bfloat16() * torch.logspace(-3, 2, rows)[:, None]
    x = x.bfloat16()
    x[-1, 3:] = 0
    added = torch.randn(48, generator=generator).bfloat16() if bias else None
    matrix = fp8_matrix(weight)
    got = scaled_linear.linear(x, matrix, added).float()
    rounded, scale = scaled_linear.rounded_rows(x, torch.float8_e4m3fn)
    want = (rounded.float() * scale) @ (matrix.weight.float() * matrix.scale.t()).t()
    want = want if added is None else want + added.float()
    torch.testing.assert_close(got, want, rtol=2e-2, atol=1e-4 * float(want.abs().max()))
    exact = x.float() @ weight.float().t() + (0 if added is None else added.float())
    assert float((got - exact).norm() / exact.norm()) < 0.06
    assert matrix.weight.element_size() == 1


def test_scales_on_the_wrong_side_are_caught() -> None:
    weight, x = torch.randn(16, 32).bfloat16(), torch.randn(4, 32).bfloat16()
    weight[3] *= 40
    matrix = fp8_matrix(weight)
    wrong = scaled_linear.ScaledMatrix(matrix.weight, matrix.scale.flip(1))
    exact = x.float() @ weight.float().t()
    got = scaled_linear.linear(x, wrong).float()
    assert float((got - exact).norm() / exact.norm()) > 0.5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_matrices_that_are_not_rounded_take_the_usual_product(dtype: str) -> None:
    def linear(x: Any, weight: Any, bias: Any = None) -> Any:
        return scaled_linear.linear(x, scaled_linear.DenseMatrix(weight), bias)

    assert verdict_of(OPS["linear"], linear, dtype).status == "pass"
