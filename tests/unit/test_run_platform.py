"""Guards `ci/run_platform`: without the device it says so and exits with 3; its stages run (here at
tiny sizes on the CPU), find a difference, and one that breaks leaves the others."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from device import speed, stages
from device.card import Card, NoCard, open_card

from sixfold.platforms import select
from sixfold.platforms.machine import observe

SCRIPT = Path(__file__).parents[2] / "ci" / "run_platform.py"


@pytest.fixture(scope="module")
def card() -> Card:
    torch.set_num_threads(1)
    return open_card("cpu", stages.SMALL)


def absent() -> str:
    """A platform that this machine has no device for."""
    found = select.probe_all(observe())
    return next(name for name in ("npu", "xpu", "rocm", "cuda") if not found[name].usable)


def test_without_the_device_nothing_runs_and_the_status_says_so(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    command = [sys.executable, str(SCRIPT), absent(), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert done.stdout.startswith("SKIPPED, nothing ran: The platform")
    assert "found" in json.loads(out.read_text())["stages"]["environment"]["no device"]
    with pytest.raises(NoCard, match="cannot serve here"):
        open_card(absent(), stages.SMALL)


def test_an_unknown_stage_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "cpu", "--stages", "speeed"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "There is no stage speeed; there are environment, " in done.stderr


def test_the_script_and_the_suite_have_the_same_stages() -> None:
    module = _script()
    asked = Namespace(stages="")
    assert module.stage_names(asked) == list(stages.STAGES)


def test_a_stage_that_ends_its_process_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    module = _script()
    monkeypatch.setattr(module, "__file__", "/nowhere/run_platform.py")
    result = module.run_stage(Namespace(platform="cpu", small=True), "graphs")
    assert not result["ok"]
    assert "ended with status 2" in result["error"]


def _script() -> Any:
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("run_platform", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("stage", ["environment", "agreement", "graphs", "operations"])
def test_stages_run(card: Card, stage: str) -> None:
    result = stages.STAGES[stage](card)
    json.dumps(result, default=float)
    assert result["ok"], result


def test_the_model_stage_times_both_ways(card: Card) -> None:
    runs = stages.STAGES["model"](card)["runs"]
    assert [(run["graphs"], run["rows"]) for run in runs] == [
        ("on", 1), ("on", 3), ("off", 1), ("off", 3)
    ]  # fmt: skip
    assert {run["step"] for run in runs if run["graphs"] == "off"} == {"op by op"}
    assert all(run["decode tokens/s"] > 0 for run in runs)


def test_a_device_that_differs_is_found(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    true = stages.forced
    calls: list[int] = []

    def differing(*args: Any) -> np.ndarray:
        calls.append(1)
        return true(*args) + 0.3 * (len(calls) == 2)

    monkeypatch.setattr(stages, "forced", differing)
    assert not stages.agreement(card)["ok"]
    calls.clear()
    assert not stages.graphs(card)["ok"]


def test_a_backend_that_fails_is_recorded(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(speed, "decode_work", broken)
    found = speed.attention_speed(card, 1e9)
    assert any("illegal memory access" in one.get("error", "") for one in found)
