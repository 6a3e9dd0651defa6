"""Guards the AttentionBackend contract: plan, bind and run against the numpy reference of
`common/ops/attention.py`, for every backend of the cpu platform and every case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.attention_checks import cpu_backends, run_case
from support.kernel_checks import cpu_device, cpu_facts

from sixfold.common.ops import OPS
from sixfold.common.ops.attention import flat_slots
from sixfold.common.ops.conformance import DTYPES, check_op
from sixfold.common.ops.suite import ATTENTION, attention_subject
from sixfold.platforms.interface_attention import AttentionBackend
from sixfold.platforms.interface_kv import KVGroup
from sixfold.platforms.interface_step import StepBatch
from sixfold.platforms.torch_runtime.attention_plan import (
    AttentionPlan,
    DecodeBlock,
    plan_attention,
)
from sixfold.platforms.torch_runtime.conformance import LAYER, TorchRunner

OP = OPS["attention"]
CASES = list(OP.cases(np.random.default_rng(7)))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("op", [title for title in ATTENTION if not OPS[title].kv_dtype])
@pytest.mark.parametrize("backend", cpu_backends(), ids=lambda b: b.name)
def test_equals_the_reference(op: str, backend: AttentionBackend) -> None:
    subject = attention_subject(OPS[op], backend, cpu_facts(), TorchRunner(cpu_device()))
    (verdict,) = check_op(OPS[op], [subject], seed=7)
    assert verdict.status == "pass", verdict
    assert set(verdict.errors) == set(DTYPES)
    assert not verdict.refused


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_writes_the_new_keys_and_values(case) -> None:
    _, pool = run_case(cpu_backends()[0], case, "float32")
    args = case.args
    slots = flat_slots(
        args["page_table"], args["query_start"], args["context_lens"], args["page_size"]
    )
    flat = pool.data[LAYER].view(-1, 2, *args["k"].shape[1:]).numpy()
    np.testing.assert_array_equal(flat[slots, 0], args["k"])
    np.testing.assert_array_equal(flat[slots, 1], args["v"])


@pytest.mark.parametrize("name", ["mixed", "window_chunk", "decode_unlike_lengths"])
def test_a_row_alone_gives_what_it_gives_in_the_batch(name: str) -> None:
    case = next(c for c in CASES if c.name == name)
    together, _ = run_case(cpu_backends()[0], case, "float32")
    args = case.args
    for row in range(len(args["context_lens"])):
        where = slice(args["query_start"][row], args["query_start"][row + 1])
        length = where.stop - where.start
        alone = type(case)(
            name,
            {
                **args,
                **{part: args[part][where] for part in "qkv"},
                "page_table": args["page_table"][row : row + 1],
                "query_start": np.array([0, length], np.int32),
                "context_lens": args["context_lens"][row : row + 1],
            },
        )
        single, _ = run_case(cpu_backends()[0], alone, "float32")
        np.testing.assert_allclose(single, together[where], rtol=1e-5, atol=1e-6)


def test_small_decode_blocks_and_large_ones_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(c for c in CASES if c.name == "decode_unlike_lengths")
    large, _ = run_case(cpu_backends()[0], case, "float32")
    monkeypatch.setattr("sixfold.platforms.torch_runtime.attention.GATHER_BYTES", 1)
    small, _ = run_case(cpu_backends()[0], case, "float32")
    np.testing.assert_allclose(small, large, rtol=1e-5, atol=1e-6)


def test_query_blocks_agree_with_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(c for c in CASES if c.name == "window_chunk")
    one, _ = run_case(cpu_backends()[0], case, "float32")
    monkeypatch.setattr("sixfold.platforms.torch_runtime.attention_plan.QUERY_BLOCK", 4)
    many, _ = run_case(cpu_backends()[0], case, "float32")
    np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-6)


def _plan_with(**changes: Any) -> Callable[..., AttentionPlan]:
    def plan(batch: StepBatch, group: KVGroup, block_tokens: int) -> AttentionPlan:
        made = plan_attention(batch, group, block_tokens)
        return replace(made, **{name: change(made, group) for name, change in changes.items()})

    return plan


def _later_last(plan: AttentionPlan, group: KVGroup) -> tuple[DecodeBlock, ...]:
    return tuple(replace(block, first=0, seen=None) for block in plan.decodes)


FAULTS = {
    "slots_one_late": ("mixed", {"slots": lambda plan, _: (plan.slots + 1) % 32}),
    "fresh_pages_not_cleared": (
        "decode_page_boundary",
        {"fresh": lambda plan, _: plan.fresh[:0]},
    ),
    "decode_sees_padding": ("decode_unlike_lengths", {"decodes": _later_last}),
    "decode_ignores_window": ("window_below_page", {"decodes": _later_last}),
    "prefill_window_one_wider": (
        "window_chunk",
        {"prefills": lambda plan, _: tuple(replace(r, window=r.window + 1) for r in plan.prefills)},
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_plan_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, changes = FAULTS[fault]
    where = "sixfold.platforms.torch_runtime.attention.plan_attention"
    monkeypatch.setattr(where, _plan_with(**changes))
    case = next(c for c in CASES if c.name == name)
    got, _ = run_case(cpu_backends()[0], case, "float32")
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(got, OP.reference(**case.args), rtol=1e-5, atol=1e-5)
