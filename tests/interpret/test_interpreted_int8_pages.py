"""Guards keys and values in eight bits in Triton: in the interpreter attention equals the reference
on rows rounded as the cache rounds them, cut for 32 and for 64 lanes; what is written is what every
platform writes, bit for bit; and faults in the sources are caught."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.attention_checks import run_case
from support.triton_checks import WARP_64, attention_backend, small_cut, triton_facts, with_fault

from sixfold.common.ops import OPS
from sixfold.common.ops.conformance import round_case
from sixfold.common.ops.paging import from_int8_rows, to_int8_rows
from sixfold.platforms.interface import DeviceFacts
from sixfold.platforms.interface_attention import AttentionSpec
from sixfold.platforms.interface_kernels import Case
from sixfold.platforms.torch_runtime.conformance import LAYER
from sixfold.platforms.triton_kernels import attention, int8_pages, tuning

OP = OPS["attention/int8"]
CASES = {case.name: case for case in OP.cases(np.random.default_rng(11))}
FEW = (
    "first_token",
    "decode_page_boundary",
    "prefill_page_1",
    "chunk_after_context",
    "mha_80",
    "window_chunk",
    "soft_cap_window",
    "sinks_first_token",
    "sinks_soft_cap",
    "page_written_by_a_neighbour",
)
"""Every feature once; the others differ by sizes."""


def agrees(case: Case, dtype: str, backend: Any) -> None:
    case = round_case(OP, case, dtype)
    got, pool = run_case(backend, case, dtype, "int8")
    tolerance = OP.tolerance[dtype]
    want = OP.reference(**case.args)
    np.testing.assert_allclose(got, want, rtol=tolerance.rtol, atol=tolerance.atol)
    assert bool((pool.data[1 - LAYER] == 7).all()), "another layer was touched"


def chosen(*names: str) -> list[Any]:
    """The others are for the matrix's workflows."""
    marks = {name: () if name in names else (pytest.mark.wide,) for name in CASES}
    return [pytest.param(case, id=name, marks=marks[name]) for name, case in CASES.items()]


@pytest.mark.parametrize("case", chosen(*FEW))
def test_cut_small_it_equals_the_reference(case: Case) -> None:
    agrees(case, "float32", attention_backend(small_cut()))


@pytest.mark.parametrize("facts", [triton_facts(), WARP_64], ids=lambda f: f"{f.lane_width}_lanes")
@pytest.mark.parametrize("case", chosen("decode_page_boundary", "sinks_soft_cap"))
def test_cut_as_the_table_says_it_equals_the_reference(case: Case, facts: DeviceFacts) -> None:
    agrees(case, "float16", attention_backend(facts=facts))


def written(module: Any, x: torch.Tensor, facts: DeviceFacts) -> tuple[np.ndarray, np.ndarray]:
    """What one token's keys and values become, (tokens, heads, dim + 4) each; in pages of 3."""
    tokens, heads, dim = x.shape
    storage = torch.zeros((4, heads, 2, 3, dim + 4), dtype=torch.int8)
    keys, values = storage.permute(2, 0, 3, 1, 4).unbind(0)
    slots = torch.arange(tokens) * 2 + 1
    module.write_int8_pages(tuning.choose(facts), keys, values, slots, x, -2 * x)
    untouched = np.setdiff1d(np.arange(12), slots.numpy())
    by_slot = [part.reshape(12, heads, dim + 4).numpy() for part in (keys, values)]
    assert not by_slot[0][untouched].any()
    return by_slot[0][slots], by_slot[1][slots]


def rows() -> torch.Tensor:
    """Ties between two codes, rows of zeros, tiny and huge ones, a NaN; parts of a wider tensor."""
    x = torch.randn(5, 3, 24, generator=torch.Generator().manual_seed(2))
    x[0, 0] = 0.0
    x[1, 0] = torch.arange(24) - 11.5
    x[1, 0, 0] = 127.0
    x[2, 1] *= 1e-20
    x[3, 2] *= 1e20
    x[4, 0, 7] = torch.nan
    return x[:, :, :20]


@pytest.mark.parametrize("facts", [triton_facts(), WARP_64], ids=lambda f: f"{f.lane_width}_lanes")
def test_what_is_written_is_what_every_platform_writes(facts: DeviceFacts) -> None:
    x = rows()
    keys, values = written(int8_pages, x, facts)
    for got, want in ((keys, x), (values, -2 * x)):
        expected = to_int8_rows(want.numpy())
        good = ~np.isnan(want.numpy()).any(-1)
        np.testing.assert_array_equal(got[good], expected[good])
        assert np.isnan(from_int8_rows(got)[~good]).all()


WRITE_FAULTS = [
    ("/ 127.0", "/ 128.0"),
    ("12582912.0) - 12582912.0", "0.4) - 0.4"),
    ('broken, float("nan")', "broken, 1.0"),
    ("target // 4 + DIM", "target // 4 - 1 + DIM"),
]


@pytest.mark.parametrize(("old", "new"), WRITE_FAULTS)
def test_a_fault_in_writing_is_caught(old: str, new: str, tmp_path: Path) -> None:
    faulty, x = with_fault("int8_pages", old, new, tmp_path), rows()
    got, right = (written(module, x, triton_facts())[0] for module in (faulty, int8_pages))
    assert not np.array_equal(got, right)


READ_FAULTS = [
    ("steps_ptr + row_at // 4 + DIM // 4", "steps_ptr + row_at // 4 + DIM // 4 - 1"),
    ("step_at + PAGE_SIZE * ROW // 4", "step_at"),
    ("steps_ptr += kv_head * 2 * PAGE_SIZE * ROW // 4", "steps_ptr += 0"),
    ("kv_head * 2 * PAGE_SIZE * ROW\n", "kv_head * 2 * PAGE_SIZE * DIM\n"),
]


@pytest.mark.parametrize(("old", "new"), READ_FAULTS)
def test_a_fault_in_reading_is_caught(
    old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = with_fault("attention_kernels", old, new, tmp_path)
    monkeypatch.setattr(attention, "attention_kernel", made.attention_kernel)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        agrees(CASES["decode_page_boundary"], "float32", attention_backend(small_cut()))


def test_what_it_cannot_keep_is_refused_with_the_reason() -> None:
    def reasons(dim: int, kv_dtype: str) -> str:
        spec = AttentionSpec(4, 2, dim, 0.1, dtype="float16", kv_dtype=kv_dtype)
        return "; ".join(attention.refusals(spec, triton_facts()))

    assert reasons(64, "int8") == ""
    assert reasons(66, "int8") == "int8 rows of multiples of 4 numbers, not 66"
    assert reasons(64, "bfloat16") == "keeps keys and values in float16 or int8, not bfloat16"
