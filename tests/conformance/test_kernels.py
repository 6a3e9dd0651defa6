"""Guards law 8: every kernel that the cpu platform registers has a contract and passes all of its
cases, in every dtype it accepts; every op has cases; and a fault in a kernel is caught."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.kernel_checks import cpu_facts, cpu_registry, verdict_of

from sixfold.common.ops import OPS
from sixfold.common.ops.conformance import DTYPES, run_suite
from sixfold.common.ops.suite import ATTENTION, contracts
from sixfold.platforms.cpu import PLATFORM
from sixfold.platforms.interface_kernels import Suite
from sixfold.platforms.torch_runtime import kernels as generic

# paged_attention: mlx alone has kernels (test_mlx_kernels.py). Quantised experts with routes of
# their own: Triton alone has (tests/interpret).
BY_THEIR_PLATFORM = {"paged_attention", *(title for title in OPS if "moe_experts/" in title)}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def suite() -> Suite:
    return PLATFORM.conformance(cpu_facts())


@pytest.mark.parametrize("op", OPS)
def test_every_kernel_equals_its_reference(op: str, suite: Suite) -> None:
    verdicts = run_suite(suite, {op: OPS[op]})
    if op not in BY_THEIR_PLATFORM:
        assert "pass" in {verdict.status for verdict in verdicts}, f"op {op!r} has no kernel"
    for verdict in verdicts:
        wanted = {"pass", "unsupported"} if OPS[op].weights or op in ATTENTION else {"pass"}
        assert verdict.status in wanted, verdict


def test_every_op_has_cases_and_every_kernel_a_contract() -> None:
    for title, op in OPS.items():
        assert list(op.cases(np.random.default_rng(0))), f"op {title!r} has no case"
        assert set(op.tolerance) == set(DTYPES), f"op {title!r} lacks a tolerance"
    for kernel in cpu_registry().kernels():
        assert contracts(kernel.op), f"{kernel.op!r} ({kernel.provider}) has no contract"


def test_fused_ops_name_existing_parts() -> None:
    fused = {name: op.parts for name, op in OPS.items() if op.parts}
    assert fused, "no fused op"
    for name, parts in fused.items():
        assert set(parts) <= OPS.keys() - {name}


def _shifted_embedding(ids: torch.Tensor, table: torch.Tensor, scale: float) -> torch.Tensor:
    return generic.embedding((ids + 1) % len(table), table, scale)


def _norm_over_one_less(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    scale = torch.rsqrt(x.float().pow(2).sum(-1, keepdim=True) / (x.shape[-1] - 1) + eps)
    return (x.float() * scale * weight).to(x.dtype)


def _rope_of_the_wrong_pair(q, k, cos, sin) -> Any:
    return generic.rope(q, k, cos.roll(1, -1), sin.roll(1, -1))


def _moe_with_one_expert_less(*, top_k: int, **rest: Any) -> torch.Tensor:
    return generic.moe(**rest, top_k=max(1, top_k - 1))


def _write_one_slot_late(keys, values, slots, k, v) -> Any:
    return generic.kv_write(keys, values, (slots + 1) % len(keys), k, v)


def _copy_in_sequence(pool, sources, targets) -> torch.Tensor:
    for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
        pool[:, target] = pool[:, source]
    return pool


def _draw_one_late(logits, sampling, grammar_mask=None, pending=None) -> torch.Tensor:
    tokens = generic.sample(logits, sampling, grammar_mask, pending)
    return torch.where(tokens >= 0, (tokens + 1) % logits.shape[1], tokens)


def _gate_and_up_swapped(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return generic.silu_mul(up, gate)


def _clobbers_its_input(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(gate, inplace=True).mul(up)


FAULTS: list[tuple[str, Callable[..., Any]]] = [
    ("embedding", _shifted_embedding),
    ("rms_norm", _norm_over_one_less),
    ("rope", _rope_of_the_wrong_pair),
    ("moe", _moe_with_one_expert_less),
    ("kv_write", _write_one_slot_late),
    ("page_copy", _copy_in_sequence),
    ("sample", _draw_one_late),
    ("silu_mul", _gate_and_up_swapped),
    ("silu_mul", _clobbers_its_input),
]


@pytest.mark.parametrize(("op", "fault"), FAULTS, ids=lambda x: getattr(x, "__name__", x))
def test_a_faulty_kernel_is_caught(op: str, fault: Callable[..., Any]) -> None:
    verdict = verdict_of(OPS[op], fault)
    assert verdict.status == "fail"
    assert verdict.failures[0].message


def test_a_write_outside_the_storage_is_caught() -> None:
    def overruns(keys, values, slots, k, v):
        result = generic.kv_write(keys, values, slots, k, v)
        storage = torch.as_strided(keys, (1,), (1,), keys.storage_offset() + keys.numel())
        storage.fill_(0.0)
        return result

    verdict = verdict_of(OPS["kv_write"], overruns)
    assert verdict.failed == verdict.executed > 0
    assert "wrote outside 'keys'" in verdict.failures[0].message


def test_a_result_that_is_not_the_storage_is_caught() -> None:
    def copies(keys, values, slots, k, v):
        return generic.kv_write(keys.clone(), values.clone(), slots, k, v)

    message = verdict_of(OPS["kv_write"], copies).failures[0].message
    assert "'keys' is to be changed in place" in message
