"""Guards `ci/run_platform`: it runs the checks that a machine can do, says why it skips others, and
fails for what breaks, takes too long or runs nothing; its stages run (here at tiny sizes on the
CPU), and find a difference."""

from __future__ import annotations

import json
import os
import signal
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
from support.emulated_npu.platform import PLATFORM, facts

from sixfold.common.evidence import read
from sixfold.platforms import select
from sixfold.platforms.machine import observe

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "ci" / "run_platform.py"
sys.path.insert(0, str(ROOT / "ci"))

import matrix  # noqa: E402 (after the line that finds it)
import run_check  # noqa: E402
import run_column  # noqa: E402
from matrix import Check  # noqa: E402
from run_check import Place  # noqa: E402


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
    command = [sys.executable, str(SCRIPT), absent(), "--evidence", "device", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert done.stdout.splitlines()[-1].startswith("SKIPPED, nothing ran")
    report = read(out)
    assert {result.state for result in report.results.values()} == {"skipped"}
    assert "found" in report.results["conformance"].reason
    with pytest.raises(NoCard, match="cannot serve here"):
        open_card(absent(), stages.SMALL)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["cpu", "--checks", "speeed"], "cpu has no check speeed here; it has selection, "),
        (["cpu", "--evidence", "rumour"], "no kind rumour; there are device, "),
        (["abacus"], "no platform abacus; there are cuda, "),
    ],
)
def test_what_there_is_not_is_refused(more: list[str], message: str) -> None:
    command = [sys.executable, str(SCRIPT), *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr


def test_the_matrix_and_the_suite_have_the_same_stages() -> None:
    found = [check.stage for check in matrix.load().checks if check.stage]
    assert found == list(stages.STAGES)


def names(platform: str, device: bool, machine: str = "linux-x86_64", **asked: str) -> list[str]:
    given = Namespace(**{"checks": "", "evidence": "", **asked})
    return [c.name for c in run_column.chosen(matrix.load(), platform, machine, device, given)]


def test_the_device_decides_what_is_run() -> None:
    """With a card only what needs it; without, only what does not; on a CPU all."""
    on_card, without = names("cuda", True), names("cuda", False)
    assert on_card[:2] == ["environment", "conformance"]
    assert "http" in on_card
    assert not set(on_card) & set(without)
    assert without[-1] == "traced"
    assert {"kernels", "engine", "instruction_sets"} <= set(names("cpu", True))
    assert "arm64" not in names("cpu", True, "darwin-arm64")
    assert names("cuda", True, evidence="traced") == ["traced"]


def test_what_another_platforms_run_shows_is_run_once_unless_named() -> None:
    assert "interpreted_kernels" in names("cuda", False)
    hosted = ["hosted_http_demo", "hosted_text", "hosted_kernels"]
    interpreted = ["interpreted_http", "interpreted_http_demo", "hosted_text_interpreted"]
    assert names("xpu", False) == [*hosted, *interpreted, "contracts", "traced"]
    assert names("xpu", False, checks="interpreted_kernels") == ["interpreted_kernels"]


def place(tmp_path: Path) -> Place:
    (tmp_path / "sixfold").symlink_to(ROOT)
    return Place("cpu", tmp_path)


def check(**fields: Any) -> Check:
    return Check("one", "kernels", "device", ("cpu",), **fields)


def test_a_stage_that_ends_its_process_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ended = run_check.Ended(-11, "", "loading\nillegal memory access")
    monkeypatch.setattr(run_check, "_python", lambda *args: ended)
    result = run_check.run_check(check(stage="graphs"), place(tmp_path))
    assert result.state == "failed"
    assert result.reason == "ended with status -11: loading / illegal memory access"


def test_a_script_that_ends_badly_or_too_late_is_a_failure(tmp_path: Path) -> None:
    here = place(tmp_path)
    assert run_check.run_check(check(script=("ci/count_predicates.py",)), here).state == "passed"
    ended = run_check.run_check(check(script=("ci/no_such_script.py",)), here)
    assert ended.state == "failed"
    assert ended.reason.startswith("status 2: ")
    assert str(ROOT) not in ended.reason
    late = run_check.run_check(check(script=("ci/count_predicates.py",), minutes=0), here)
    assert (late.state, late.reason) == ("failed", "took longer than 0 minutes")


WAITS = "import os, sys\nopen(sys.argv[1], 'w').write(str(os.getpid()))\nopen(sys.argv[1]).read()"
RUNS = """
import sys
sys.path.insert(0, {ci!r})
from pathlib import Path
from run_platform import end_with_the_check
import run_check
end_with_the_check()
check = run_check.Check("one", "kernels", "device", ("cpu",), script=({script!r}, {pipe!r}))
run_check.run_check(check, run_check.Place("cpu", Path({folder!r})))
"""


def test_a_sigterm_ends_the_check_that_is_running(tmp_path: Path) -> None:
    """The check tells its process through a pipe, then waits at the pipe for ever."""
    pipe, script = tmp_path / "pipe", tmp_path / "waits.py"
    os.mkfifo(pipe)
    script.write_text(WAITS)
    code = RUNS.format(
        ci=str(ROOT / "ci"), script=str(script), pipe=str(pipe), folder=str(tmp_path)
    )
    running = subprocess.Popen([sys.executable, "-c", code])
    child = int(pipe.read_text())
    os.kill(child, 0)
    running.terminate()
    assert running.wait(60) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_what_is_not_installed_is_skipped_with_its_name(tmp_path: Path) -> None:
    lacking = check(script=("ci/count_predicates.py",), needs=("python3", "no_such_module"))
    result = run_check.run_check(lacking, place(tmp_path))
    assert (result.state, result.reason) == ("skipped", "no_such_module not installed")


PYTEST = """
import pytest

def test_right(): pass

def test_wrong(): assert 0

def test_elsewhere(): pytest.skip("no such card")
"""


def test_pytests_own_report_is_read(tmp_path: Path) -> None:
    (tmp_path / "test_three.py").write_text(PYTEST)
    answer = tmp_path / "answer.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-c", "/dev/null", "--rootdir", str(tmp_path)]
    command += ["-p", "no:cacheprovider", "--junitxml", str(answer), str(tmp_path)]
    alone = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    subprocess.run(command, capture_output=True, check=False, env=alone)
    result = run_check.of_tests("device", answer.read_text(), "status 1")
    assert (result.state, result.reason) == ("failed", "1 failed: test_three::test_wrong")
    assert result.figures == {"passed": 1, "failed": 1, "skipped": 1}
    assert result.details["skipped"] == ["no such card"]


RIGHT = '<testcase classname="a" name="right" time="0.5"/>'
SKIPPED = '<testcase classname="a" name="b" time="0"><skipped message="no such card"/></testcase>'


@pytest.mark.parametrize(
    ("cases", "state", "reason"),
    [
        (RIGHT + SKIPPED, "passed", ""),
        (SKIPPED, "skipped", "no such card"),
        ("", "failed", "no test was found: status 5"),
    ],
)
def test_a_run_of_nothing_is_no_success(cases: str, state: str, reason: str) -> None:
    counts = f'tests="{cases.count("classname")}" skipped="{cases.count("<skipped")}"'
    text = (
        f'<testsuites><testsuite failures="0" errors="0" {counts}>{cases}</testsuite></testsuites>'
    )
    result = run_check.of_tests("device", text, "status 5")
    assert (result.state, result.reason) == (state, reason)


@pytest.mark.parametrize("stage", ["environment", "agreement", "graphs", "operations"])
def test_stages_run(card: Card, stage: str) -> None:
    result = stages.STAGES[stage](card)
    json.dumps(result, default=float)
    assert result["ok"], result


@pytest.mark.wide
@pytest.mark.parametrize("stage", ["agreement", "graphs", "model"])
def test_stages_run_on_an_npu_that_is_emulated(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose attention wants pages of its own, and whose graphs have tasks that are updated."""
    in_tree = select.platforms
    monkeypatch.setattr(select, "platforms", lambda: {**in_tree(), PLATFORM.name: PLATFORM})
    monkeypatch.setitem(sys.modules, "torch_npu", None)  # the emulator goes when the test ends
    torch.set_num_threads(1)
    result = stages.STAGES[stage](Card(PLATFORM.name, facts(), stages.SMALL))
    assert result["ok"], result
    if stage == "graphs":
        assert result["step"].startswith("captured: NPUGraph")


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
