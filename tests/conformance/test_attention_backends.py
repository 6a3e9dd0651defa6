"""Guards the AttentionBackend contract: plan, bind and run against the numpy reference of
`common/ops/attention.py`, for every backend of the cpu platform and every case."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.attention_checks import LAYER, cpu_backends, run_case
from support.kernel_checks import round_case

from sixfold.common.ops import OPS
from sixfold.common.ops.attention import flat_slots
from sixfold.platforms.interface_attention import AttentionBackend

OP = OPS["attention"]
CASES = list(OP.cases(np.random.default_rng(7)))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("backend", cpu_backends(), ids=lambda b: b.name)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_equals_the_reference(backend: AttentionBackend, dtype: str, case) -> None:
    case = round_case(OP, case, dtype)
    got, pool = run_case(backend, case, dtype)
    want = OP.reference(**case.args)
    tolerance = OP.tolerance[dtype]
    np.testing.assert_allclose(got, want, rtol=tolerance.rtol, atol=tolerance.atol)
    assert bool((pool.data[1 - LAYER] == 7.0).all()), "another layer was touched"


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
