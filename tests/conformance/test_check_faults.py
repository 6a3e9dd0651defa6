"""Guards that `sixfold check` catches a kernel that is off by one, in each of five ops and by the
size of its error, and blames no other kernel."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from support.broken_kernels import GENERIC, break_generic

from sixfold.server.commands.check import check

OPS = [*GENERIC, "attention"]


def checked() -> tuple[int, dict[tuple[str, str], dict[str, Any]]]:
    named = [word for op in OPS for word in ("--op", op)]
    result = CliRunner().invoke(check, ["--platform", "cpu", *named, "--json"])
    found = json.loads(result.stdout)["kernels"]
    return result.exit_code, {(kernel["op"], kernel["provider"]): kernel for kernel in found}


def test_five_kernels_off_by_one_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    right, before = checked()
    assert right == 0
    break_generic(monkeypatch)
    wrong, after = checked()
    assert wrong == 1
    broken = {(op, "sdpa" if op == "attention" else "generic") for op in OPS}
    assert {key for key, kernel in after.items() if kernel["status"] == "fail"} == broken
    for key, kernel in after.items():
        if key == ("attention/int8", "sdpa"):
            assert kernel["status"] == before[key]["status"] == "unsupported"
            continue
        assert before[key]["status"] == "pass"
        if key in broken:
            assert kernel["failures"][0]["error"] > 0
            assert kernel["failures"][0]["message"]
        else:
            assert kernel["status"] == "pass"
            assert kernel["passed"] == before[key]["passed"]
