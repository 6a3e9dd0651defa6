"""Guards what captured steps stand on: the generic kernels of DeepSeek-V4's own ops need shapes
alone where every row has one token, and those that write states and entries do so in every step.

Run on the meta device, where a tensor has no values: whatever reads one on the host raises.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.kernel_checks import verdict_of

from sixfold.common.ops import OPS
from sixfold.common.ops.conformance import as_list
from sixfold.platforms.interface_kernels import Case
from sixfold.platforms.torch_runtime import compressed_attention
from sixfold.platforms.torch_runtime.kernels import GENERIC

ALWAYS = (
    "mhc_pre", "mhc_post", "mhc_post_pre", "mhc_head", "interleaved_rope", "shared_kv_norm_rope",
    "grouped_linear", "inverse_rope_grouped_linear", "compress_norm_rope_store",
)  # fmt: skip
IN_DECODE = ("index_topk", "compressed_attention")
LONG = ("prefill", "mixed", "mixed_all", "mixed_selected", "few_of_many", "longer_than_a_block")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def run(op: str, case: Case) -> list[torch.Tensor]:
    args: dict[str, Any] = {
        name: torch.from_numpy(value.copy()).to("meta") if isinstance(value, np.ndarray) else value
        for name, value in case.args.items()
    }
    return as_list(GENERIC[op](**args))


def decodes(case: Case) -> bool:
    return len(case.args["q"]) == len(case.args["context_lens"])


@pytest.mark.parametrize("op", [*ALWAYS, *IN_DECODE])
def test_shapes_are_enough(op: str) -> None:
    cases = list(OPS[op].cases(np.random.default_rng(0)))
    wanted = [case for case in cases if op in ALWAYS or decodes(case)]
    assert len(wanted) > 3
    for case in wanted:
        assert all(made.is_meta for made in run(op, case)), case.name


@pytest.mark.parametrize("op", IN_DECODE)
@pytest.mark.parametrize(("scores", "sparse"), [(64, 4), (1 << 24, 0)])
def test_blocks_of_any_size_give_the_same(
    monkeypatch: pytest.MonkeyPatch, op: str, scores: int, sparse: int
) -> None:
    """Down to one query a block, and every query with entries of its own."""
    monkeypatch.setattr(compressed_attention, "SCORES", scores)
    monkeypatch.setattr(compressed_attention, "SPARSE", sparse)
    few = replace(OPS[op], cases=lambda rng: [c for c in OPS[op].cases(rng) if c.name in LONG])
    verdict = verdict_of(few, GENERIC[op])
    assert verdict.failures == []
    assert verdict.passed >= 2


@pytest.mark.parametrize("op", IN_DECODE)
def test_a_read_on_the_host_shows(op: str) -> None:
    """Steps of longer rows are not captured, and here is why."""
    for case in OPS[op].cases(np.random.default_rng(0)):
        if not decodes(case):
            with pytest.raises((NotImplementedError, RuntimeError)):
                run(op, case)
