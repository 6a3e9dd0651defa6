"""Guards the npu platform's `sample` against its contract, over the emulator of torch_npu: which
rows the library's filter gets, that ties and seeds are the contract's, and that the emulator
refuses what the page does not say. Evidence of the kind "emulated"."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.emulated_npu import NPUError, module
from support.emulated_npu.platform import PLATFORM

from sixfold.common.ops import OPS
from sixfold.common.ops.conformance import Verdict, check_op
from sixfold.common.ops.sample_cases import random_row, sampling_arrays
from sixfold.platforms.npu import sampling


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> Any:
    torch.set_num_threads(1)
    emulator = module()
    monkeypatch.setattr(sys.modules[PLATFORM.__module__], "module", lambda: emulator)
    monkeypatch.setitem(sys.modules, "torch_npu", emulator)
    return emulator


def verdict() -> Verdict:
    subjects = [s for s in PLATFORM.conformance(None).subjects if s.op == "sample"]
    (found,) = check_op(OPS["sample"], [s for s in subjects if s.provider == "torch_npu"])
    return found


def test_it_equals_its_reference() -> None:
    found = verdict()
    assert (found.status, found.failures) == ("pass", [])
    assert found.passed > 30


def calls(library: Any) -> list[int]:
    """Rows of each call of the filter."""
    seen: list[int] = []
    op = library.npu_top_k_top_p
    library.npu_top_k_top_p = lambda logits, p, k: seen.append(len(logits)) or op(logits, p, k)
    return seen


def test_rows_that_the_op_does_not_take_go_the_generic_way(library: Any) -> None:
    rows = [
        {"top_k": 7},
        {"top_k": 1024},
        {"top_k": 1025},
        {"top_p": 0.5},
        {"top_k": 7, "temperature": 0.0},
        {"min_p": 0.1},
        {"top_k": 3, "top_p": 0.5},
    ]
    asked = sampling_arrays(rows)
    fits = [True, True, False, False, False, False, True]
    assert sampling.rows_for_the_op(asked, 5000).tolist() == fits
    small = [True, True, True, True, False, False, True]
    assert sampling.rows_for_the_op(asked, 1000).tolist() == small
    seen = calls(library)
    sampling.sample(torch.randn(7, 5000), asked)
    assert seen == [3, 3]
    seen.clear()
    sampling.sample(torch.randn(2, 5000), sampling_arrays([{"top_k": 5}, {"top_k": 9}]))
    assert seen == [2]  # no row has a top-p
    seen.clear()
    sampling.sample(torch.randn(1, 5000), sampling_arrays([{"top_p": 0.5}]))
    assert seen == []


def test_a_row_draws_what_it_draws_alone() -> None:
    rng = np.random.default_rng(5)
    rows = [random_row(rng, 1500) for _ in range(24)]
    logits = torch.from_numpy(rng.standard_normal((24, 1500)).astype(np.float32))
    together = sampling.sample(logits, sampling_arrays(rows)).tolist()
    alone = [
        sampling.sample(logits[i : i + 1], sampling_arrays([row])).item()
        for i, row in enumerate(rows)
    ]
    assert together == alone


def test_far_logits_stay_where_the_temperature_brings_them_near() -> None:
    """The op leaves out what has no probability; heat gives it some."""
    logits = torch.tensor([[0.0, -150.0, -151.0, -400.0]])
    rows = [{"top_k": 3, "temperature": 500.0, "uniform": u} for u in np.linspace(0, 0.99, 40)]
    drawn = sampling.sample(logits.expand(40, -1), sampling_arrays(rows)).tolist()
    assert set(drawn) == {0, 1, 2}


Given = dict[str, torch.Tensor]


def rest_of_p(given: Given) -> None:
    given["p"] = 1 - given["p"]


def wide_k(given: Given) -> None:
    given["k"] = given["k"].long()


def half_p(given: Given) -> None:
    given["p"] = given["p"].half()


def columns(given: Given) -> None:
    given["k"] = given["k"].unsqueeze(1)


@pytest.mark.parametrize("fault", [rest_of_p, wide_k, half_p, columns])
def test_a_fault_in_the_call_is_caught(fault: Callable[[Given], None], library: Any) -> None:
    op = library.npu_top_k_top_p

    def faulty(logits: Any, p: Any, k: Any) -> Any:
        given = {"logits": logits, "p": p, "k": k}
        fault(given)
        return op(**given)

    library.npu_top_k_top_p = faulty
    assert verdict().status == "fail"


def test_equals_in_the_ops_order_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_first", lambda x, kept, count: kept)
    assert verdict().status == "fail"


def test_logits_that_are_not_flattened_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "FLAT", 1.0)
    with pytest.raises(AssertionError):
        test_far_logits_stay_where_the_temperature_brings_them_near()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"k": None}, "required by its page"),
        ({"p": None}, "required by its page"),
        ({"k": torch.tensor([0, 1], dtype=torch.int32)}, "within"),
        ({"k": torch.tensor([9, 1], dtype=torch.int32)}, "within \\[1, 8\\]"),
        ({"p": torch.tensor([0.5, 1.5])}, "within \\[0, 1\\]"),
        ({"p": torch.tensor([0.5])}, "p is \\(2,\\)"),
        ({"logits": torch.full((2, 8), torch.nan)}, "no numbers"),
        ({"logits": torch.zeros(2, 0)}, "empty"),
        ({"logits": torch.zeros(2, 8, 1)}, "3 axes"),
    ],
)
def test_what_the_page_does_not_say_is_refused(
    changes: dict[str, Any], reason: str, library: Any
) -> None:
    given = {
        "logits": torch.randn(2, 8),
        "p": torch.tensor([0.5, 1.0]),
        "k": torch.tensor([8, 1], dtype=torch.int32),
    }
    library.npu_top_k_top_p(**given)
    with pytest.raises(NPUError, match=reason):
        library.npu_top_k_top_p(**given | changes)
