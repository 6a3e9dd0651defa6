"""Guards that a row's result does not depend on what else is in the batch, to the bit: native
attention and linear layers, at every level and number of threads, in every form they keep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.attention_checks import run_case
from support.native_forms import FORMS, HERE
from torch import Tensor

from sixfold.common.ops.attention import SINKS, Shape, build
from sixfold.platforms.cpu.native_attention import PART_KEYS, NativeAttention, NativePlan
from sixfold.platforms.cpu.native_library import Team
from sixfold.platforms.cpu.native_ops import Issuer, NativeOps
from sixfold.platforms.cpu.packing import PackedWeight
from sixfold.platforms.interface_kernels import Case
from sixfold.platforms.interface_kv import KVGroup
from sixfold.platforms.interface_step import StepBatch

BATCHES = (2, 7, 33)
LONG = (5 * PART_KEYS + 11, 1)


@pytest.fixture(params=[(level, threads) for level in HERE for threads in (1, 3)], ids=str)
def issuer(request: pytest.FixtureRequest) -> Issuer:
    level, threads = request.param
    return Issuer(Team(threads, level))


def first_rows(case: Case, first: int, last: int) -> Case:
    """Rows first..last of a case as a step of their own, on the same pages."""
    args = dict(case.args)
    starts = args["query_start"]
    where = slice(starts[first], starts[last])
    return Case(
        case.name,
        {
            **args,
            **{part: args[part][where] for part in "qkv"},
            "page_table": args["page_table"][first:last],
            "query_start": starts[first : last + 1] - starts[first],
            "context_lens": args["context_lens"][first:last],
        },
    )


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("window", [0, 700])
def test_attention_of_a_row_is_the_same_in_any_batch(
    issuer: Issuer, kv_dtype: str, window: int
) -> None:
    """Rows that decode after short and long contexts, one that prefills among them."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(0, 3 * PART_KEYS, max(BATCHES)).tolist()
    rows = [LONG, (40, 9), *((length, 1) for length in lengths)][: max(BATCHES)]
    shape = Shape("batch", tuple(rows), 16, window=window, sinks=SINKS)
    case = build(rng, shape)
    backend = NativeAttention(issuer)
    alone = [
        run_case(backend, first_rows(case, row, row + 1), "float32", kv_dtype)[0]
        for row in range(len(rows))
    ]
    for batch in BATCHES:
        together, _ = run_case(backend, first_rows(case, 0, batch), "float32", kv_dtype)
        np.testing.assert_array_equal(together, np.concatenate(alone[:batch]))


class Verifying(NativeAttention):
    """All new tokens of a row but the first are drafts."""

    def plan(self, batch: StepBatch, group: KVGroup) -> NativePlan:
        drafts = (np.diff(batch.query_start) - 1).astype(np.int32)
        return super().plan(replace(batch, draft_counts=drafts), group)


def one_token(case: Case, row: int, query: int) -> Case:
    """A new token of a row as a step of its own: those before it are in the cache."""
    args = dict(first_rows(case, row, row + 1).args)
    keys, values = args["keys"].copy(), args["values"].copy()
    for before in range(query):
        place, size = int(args["context_lens"][0]) + before, args["page_size"]
        slot = args["page_table"][0, place // size] * size + place % size
        keys[slot], values[slot] = args["k"][before], args["v"][before]
    args |= {part: args[part][query : query + 1] for part in "qkv"}
    starts = np.array([0, 1], np.int32)
    lens = args["context_lens"] + query
    changes = {"keys": keys, "values": values, "query_start": starts, "context_lens": lens}
    return Case(case.name, {**args, **changes})


@pytest.mark.parametrize("kv_dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("window", [0, 300])
def test_attention_of_a_draft_is_that_of_its_token_alone(
    issuer: Issuer, kv_dtype: str, window: int
) -> None:
    rng = np.random.default_rng(4)
    rows = ((5 * PART_KEYS + 11, 4), (PART_KEYS + PART_KEYS // 2 - 2, 5), (9, 3), (0, 2))
    case = build(rng, Shape("drafts", rows, 16, window=window, sinks=SINKS))
    together, _ = run_case(Verifying(issuer), case, "float32", kv_dtype)
    backend = NativeAttention(issuer)
    alone = [
        run_case(backend, one_token(case, row, query), "float32", kv_dtype)[0]
        for row, (_, count) in enumerate(rows)
        for query in range(count)
    ]
    np.testing.assert_array_equal(together, np.concatenate(alone))


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("n", "k"), [(100, 576), (49, 97)])
def test_linear_of_a_row_is_the_same_in_any_batch(
    issuer: Issuer, form: Callable[[Tensor], PackedWeight], n: int, k: int
) -> None:
    torch.manual_seed(n)
    weight, bias = form(torch.randn(n, k) * k**-0.5), torch.randn(n)
    x = torch.randn(130, k)
    ops = NativeOps(issuer)
    alone = torch.cat([ops.linear(x[i : i + 1].clone(), weight, bias) for i in range(len(x))])
    for batch in (*BATCHES, 97, 130):
        assert torch.equal(ops.linear(x[:batch].clone(), weight, bias), alone[:batch])
