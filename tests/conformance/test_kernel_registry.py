"""Guards the kernel choice: best that qualifies, an explicit choice honoured or refused with every
reason, strict mode, and the recorded decisions."""

from __future__ import annotations

from copy import copy
from dataclasses import replace

import pytest
from support.attention_checks import cpu_backends
from support.kernel_checks import cpu_facts, cpu_registry

from sixfold.common.errors import KernelError
from sixfold.common.ops.registry import KernelRegistry
from sixfold.platforms.interface_attention import AttentionSpec
from sixfold.platforms.interface_kernels import Kernel, Problem

PROBLEMS = [Problem("linear", "float32", {"in": 64}), Problem("linear", "float32", {"in": 512})]
SPEC = AttentionSpec(4, 2, 64, 0.125)


def kernel(provider: str, priority: int, refusal: str | None = None, below: int = 0) -> Kernel:
    def requires(facts: object, problem: Problem) -> str | None:
        if problem.dims.get("in", 0) < below:
            return f"needs at least {below} inputs"
        return refusal

    return Kernel("linear", provider, requires, lambda: provider, priority)


def registry(*kernels: Kernel) -> KernelRegistry:
    result = KernelRegistry()
    for entry in kernels:
        result.add(entry)
    return result


def test_the_best_that_qualifies_is_bound_and_the_rest_explained() -> None:
    entries = registry(kernel("generic", 0), kernel("fast", 10), kernel("fastest", 20, "no units"))
    table = entries.resolve(PROBLEMS, cpu_facts(), {})
    (decision,) = table.decisions
    assert table.linear() == "fast"
    assert decision.chosen == "fast"
    assert decision.fallback
    assert decision.rejected == (("fastest", "no units"), ("generic", "lower priority than fast"))


def test_a_kernel_must_qualify_for_every_call_site() -> None:
    entries = registry(kernel("generic", 0), kernel("wide", 10, below=128))
    table = entries.resolve(PROBLEMS, cpu_facts(), {})
    assert table.linear() == "generic"
    assert table.decisions[0].rejected == (("wide", "needs at least 128 inputs"),)


def test_an_only_provider_is_no_fallback() -> None:
    table = registry(kernel("generic", 0)).resolve(PROBLEMS, cpu_facts(), {}, strict=True)
    assert not table.decisions[0].fallback


def test_strict_refuses_a_fallback_with_the_reason() -> None:
    entries = registry(kernel("generic", 0), kernel("fast", 10, "no units"))
    with pytest.raises(KernelError, match=r"fast: no units.*--kernel linear=generic"):
        entries.resolve(PROBLEMS, cpu_facts(), {}, strict=True)


def test_a_kernel_for_other_weights_is_no_candidate() -> None:
    """Neither a fallback nor a failure of strict mode, and no choice of the user's either."""
    entries = registry(kernel("generic", 0), replace(kernel("few", 10), schemes=frozenset({"q"})))
    table = entries.resolve(PROBLEMS, cpu_facts(), {}, strict=True)
    (decision,) = table.decisions
    assert (decision.chosen, decision.fallback) == ("generic", False)
    reason = "is for quantised matrices in other schemes; this model's are float32"
    assert decision.rejected == (("few", reason),)
    with pytest.raises(KernelError, match="'few' cannot serve op 'linear': is for quantised"):
        entries.resolve(PROBLEMS, cpu_facts(), {"linear": "few"})
    mixed = [*PROBLEMS, Problem("linear", "float32", weights="q")]
    assert entries.resolve(mixed, cpu_facts(), {}).linear() == "few"


def test_an_explicit_choice_is_honoured_also_under_strict() -> None:
    entries = registry(kernel("generic", 0), kernel("fast", 10))
    table = entries.resolve(PROBLEMS, cpu_facts(), {"linear": "generic"}, strict=True)
    assert table.linear() == "generic"
    assert table.decisions[0].because == "named by the user"


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"linear": "fast"}, "no units"),
        ({"linear": "missing"}, "there are: fast, generic"),
        ({"moe": "generic"}, "No op named 'moe' is called"),
    ],
)
def test_an_impossible_choice_is_refused(chosen: dict[str, str], message: str) -> None:
    entries = registry(kernel("generic", 0), kernel("fast", 10, "no units"))
    with pytest.raises(KernelError, match=message):
        entries.resolve(PROBLEMS, cpu_facts(), chosen)


def test_an_op_without_any_kernel_is_an_error() -> None:
    with pytest.raises(KernelError, match="nothing registered"):
        registry().resolve(PROBLEMS, cpu_facts(), {})


def test_two_kernels_of_one_name_are_an_error() -> None:
    with pytest.raises(KernelError, match="Two kernels"):
        registry(kernel("generic", 0), kernel("generic", 1))


def test_an_attention_backend_is_chosen_the_same_way() -> None:
    entries = KernelRegistry()
    entries.add_attention(cpu_backends()[0])
    backend, decision = entries.resolve_attention([SPEC], cpu_facts(), None)
    assert backend.name == decision.chosen == "sdpa"
    with pytest.raises(KernelError, match="there are: sdpa"):
        entries.resolve_attention([SPEC], cpu_facts(), "paged")


def test_a_backend_without_sinks_is_passed_over_with_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entries = KernelRegistry()
    (plain,) = cpu_backends()
    lacking = copy(plain)
    monkeypatch.setattr(lacking, "name", "lacking", raising=False)
    refusal = "has no attention sinks"
    monkeypatch.setattr(lacking, "accepts", lambda spec, _: (refusal,) if spec.sinks else ())
    entries.add_attention(lacking, priority=5)
    sinks = replace(SPEC, sinks=True)
    with pytest.raises(KernelError, match=refusal):
        entries.resolve_attention([SPEC, sinks], cpu_facts(), None)
    entries.add_attention(plain)
    backend, decision = entries.resolve_attention([SPEC, sinks], cpu_facts(), None)
    assert backend is plain
    assert decision.rejected[0] == ("lacking", refusal)


def test_tree_masks_need_a_backend_that_says_it_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    (backend,) = cpu_backends()
    entries, trees = KernelRegistry(), replace(SPEC, tree=True)
    entries.add_attention(backend)
    assert entries.resolve_attention([trees], cpu_facts(), None)[0] is backend
    with pytest.raises(KernelError, match="no tree masks within a window"):
        entries.resolve_attention([replace(trees, window=8)], cpu_facts(), None)
    monkeypatch.setattr(type(backend), "tree_masks", False)
    with pytest.raises(KernelError, match="has no tree masks"):
        entries.resolve_attention([trees], cpu_facts(), None)


def test_the_native_kernel_goes_before_torchs_products() -> None:
    """How those follow one another was measured: tests/unit/test_linear_preference.py."""
    problems = [replace(problem, dtype="float32") for problem in PROBLEMS]
    decision = cpu_registry().resolve(problems, cpu_facts(), {}).decisions[0]
    assert decision.chosen == "native"
    assert not decision.fallback


def test_quantised_weights_need_a_kernel_that_has_them() -> None:
    problem = Problem("linear", "float32", {"k": 64, "n": 64}, "int4")
    registry = cpu_registry()
    assert registry.resolve([problem], cpu_facts(), {}).decisions[0].chosen == "native"
    with pytest.raises(KernelError, match="has no int4 weights"):
        registry.resolve([problem], cpu_facts(), {"linear": "generic"})
    with pytest.raises(KernelError, match="computes in float32"):
        registry.resolve([replace(problem, dtype="bfloat16")], cpu_facts(), {})
