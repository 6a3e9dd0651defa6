"""Guards that `sixfold check --interpret` catches a Triton kernel that is off by one in its source,
in each of five ops and by the size of its error."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from support.broken_kernels import register_broken
from support.triton_checks import triton_facts, with_fault

from sixfold.common.ops import OPS
from sixfold.platforms.triton_kernels import attention, tuning
from sixfold.platforms.triton_kernels.register import OPS as MODULES
from sixfold.server.commands.check import check

FAULTS = {
    "rms_norm": ("/ width + eps", "/ (width - 1) + eps"),
    "rope": ("cos_ptr + token * HALF", "cos_ptr + tl.maximum(token - 1, 0) * HALF"),
    "sample": ("inside = token < vocab", "inside = token < vocab - 1"),
    "kv_write": ("slot = tl.load(slots_ptr + token)", "slot = (tl.load(slots_ptr + token) ^ 1)"),
}
ATTENTION_CASES = OPS["attention"].cases
LAST_KEY = ("key[None, :] <= place[:, None]", "key[None, :] < place[:, None]")


def break_triton(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    cut = tuning.choose(triton_facts())
    broken = {
        op: partial(getattr(with_fault(MODULES[op], old, new, folder), op), cut)
        for op, (old, new) in FAULTS.items()
    }
    register_broken(monkeypatch, "triton", broken)
    made = with_fault("attention_kernels", *LAST_KEY, folder)
    monkeypatch.setattr(attention, "attention_kernel", made.attention_kernel)


def test_five_kernels_off_by_one_are_caught(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ops = [*FAULTS, "attention", "silu_mul", "layer_norm"]
    named = [word for op in ops for word in ("--op", op)]
    for title in ("attention", "attention/int8"):
        few = replace(OPS[title], cases=lambda rng: list(ATTENTION_CASES(rng))[:4])
        monkeypatch.setitem(OPS, title, few)
    break_triton(monkeypatch, tmp_path)
    done = CliRunner().invoke(check, ["--platform", "cuda", "--interpret", *named, "--json"])
    assert done.exit_code == 1
    kernels: list[dict[str, Any]] = json.loads(done.stdout)["kernels"]
    found = {k["op"]: k for k in kernels if k["provider"] == "triton" and k["executed"]}
    assert set(found) == {*ops, "attention/int8"}
    for op, kernel in found.items():
        if op in ("silu_mul", "layer_norm"):
            assert kernel["status"] == "pass"
            continue
        assert kernel["status"] == "fail"
        assert kernel["failures"][0]["error"] > 0
        assert kernel["failures"][0]["message"]
