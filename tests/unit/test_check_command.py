"""Guards `sixfold check`: what passed, failed, is refused or could not run is shown and told apart,
a fault anywhere fails the command, and so does a run in which nothing ran."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from checked_platform import CheckedPlatform, one_row_late, subject
from click.testing import CliRunner, Result
from toy_platform import ToyPlatform

from sixfold.common.errors import ConfigError, PlatformError
from sixfold.common.ops import OPS
from sixfold.platforms import select
from sixfold.platforms.interface_kernels import Subject
from sixfold.server.commands.check import check

RIGHT = subject("embedding", OPS["embedding"].reference)
WRONG = subject("embedding", one_row_late, "fast")
REFUSES = subject(
    "silu_mul", OPS["silu_mul"].reference, requires=lambda case, dtype: "needs a wider unit"
)
ELSEWHERE = subject("linear", OPS["linear"].reference, unverified=lambda dtype: "needs the chip")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):
    def run(subjects: list[Subject], *arguments: str) -> Result:
        CheckedPlatform(*subjects).installed(monkeypatch)
        return CliRunner().invoke(check, ["--platform", "checked", *arguments])

    return run


def test_a_platform_without_a_fault_passes(run) -> None:
    result = run([RIGHT, REFUSES, ELSEWHERE])
    assert result.exit_code == 0
    assert "12 exact" in result.stdout
    assert "unsupported\n  numpy: needs a wider unit: silu_mul" in result.stdout
    assert "unverified\n  numpy: needs the chip: linear" in result.stdout
    assert "12 cases ran on 3 kernels; none failed" in result.stdout


def test_several_reasons_of_one_refusal_stand_apart(run) -> None:
    def requires(case: object, dtype: str) -> str:
        return f"needs a chip; serves int4, not {dtype}"

    silent = subject("silu_mul", OPS["silu_mul"].reference, "chip", requires=requires)
    shown = run([RIGHT, silent]).stdout
    assert shown.count("needs a chip: silu_mul") == 1
    assert "chip: serves int4, not float16: silu_mul" in shown


def test_a_faulty_kernel_fails_the_command_and_is_named(run) -> None:
    result = run([RIGHT, WRONG])
    assert result.exit_code == 1
    assert "FAIL embedding fast, case 'one' in float32" in result.stdout
    assert "largest error" in result.stdout
    assert "FAILED: embedding fast" in result.stdout


def test_a_kernel_that_raises_fails_and_the_others_run(run) -> None:
    def broken(**args: object) -> None:
        raise RuntimeError("no such instruction\nat line 3")

    result = run([subject("embedding", broken, "broken"), RIGHT])
    assert result.exit_code == 1
    assert "RuntimeError: no such instruction" in result.stdout
    assert "12 exact" in result.stdout


def test_the_json_says_the_same(run) -> None:
    result = run([RIGHT, WRONG, REFUSES], "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert (found["platform"], found["evidence"], found["failed"]) == ("checked", "device", 1)
    kernels = {(k["op"], k["provider"]): k for k in found["kernels"]}
    assert kernels["embedding", "numpy"]["status"] == "pass"
    assert kernels["embedding", "numpy"]["errors"]["bfloat16"] == 0
    assert kernels["embedding", "fast"]["failures"][0]["case"] == "one"
    assert kernels["silu_mul", "numpy"]["refused"] == {"needs a wider unit": 12}


@pytest.mark.parametrize("subjects", [[], [REFUSES, ELSEWHERE]])
def test_a_run_of_nothing_fails_and_says_why(run, subjects: list[Subject]) -> None:
    result = run(subjects)
    assert result.exit_code != 0
    assert isinstance(result.exception, PlatformError)
    reasons = ["needs a wider unit", "needs the chip"] if subjects else ["no kernel"]
    for reason in ("No case ran at all", *reasons):
        assert reason in str(result.exception)


def test_one_op_with_and_without_its_scheme(run) -> None:
    assert "12 cases ran on 1 kernels" in run([RIGHT, REFUSES], "--op", "embedding").stdout
    unknown = run([RIGHT], "--op", "embeding")
    assert isinstance(unknown.exception, ConfigError)
    assert "There is no op 'embeding'; there are embedding, linear" in str(unknown.exception)


@pytest.mark.parametrize("more", [[], ["--interpret"]])
def test_an_unknown_platform_lists_what_there_is(more: list[str]) -> None:
    result = CliRunner().invoke(check, ["--platform", "abacus", *more])
    assert isinstance(result.exception, PlatformError)
    assert "There is no platform 'abacus'; there are cuda, rocm" in str(result.exception)


def test_a_platform_without_a_suite_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "platforms", lambda: {"toy": ToyPlatform()})
    result = CliRunner().invoke(check, [])
    assert isinstance(result.exception, PlatformError)
    assert "The toy has no kernels" in str(result.exception)


def test_results_of_an_interpreter_are_called_so(run) -> None:
    assert "(interpreted)" in run([RIGHT], "--interpret").stdout


def test_the_cpu_shows_all_of_its_providers() -> None:
    """The command itself, in a process of its own; progress does not reach the output."""
    command = [sys.executable, "-m", "sixfold", "check", "--platform", "cpu", "--op", "linear"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("running linear\nrunning linear/int8_channel\n")
    found = json.loads(done.stdout)
    assert {"generic", "native", "onednn"} <= {kernel["provider"] for kernel in found["kernels"]}
