"""Guards `sixfold verify`: its parts see a right server and a right suite pass and wrong ones fail,
a process that ends is a result, and the report is written whatever happened."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from serving import Launcher, Running
from toy_platform import FACTS, ToyPlatform

from sixfold.common.errors import ConfigError, PlatformError, SixfoldError
from sixfold.common.evidence import Result, read
from sixfold.common.ops.conformance import Failure, Verdict
from sixfold.platforms.interface import DeviceFacts
from sixfold.platforms.interface_collectives import CollectivesFound
from sixfold.server import verification
from sixfold.server.commands import verify as command
from sixfold.server.verification import Wanted, WrongAnswer

TOY = Wanted("toy", model="a model of unknown answers")


@pytest.fixture(scope="module")
def toy(launcher: Launcher, toy_model: Path) -> Running:
    return launcher.start(toy_model, "--platform", "toy")


def test_answers_and_speed_of_a_server_that_is_right(toy: Running) -> None:
    found = verification.answers(TOY, toy.url)
    assert found.state == "passed"
    assert found.figures["asked again"] == "equal"
    assert found.figures["of 8 at a time equal"] == 8
    assert -math.log(256) < found.figures["mean log-probability"] < 0
    rates = verification.speed(TOY, toy.url).figures
    assert rates["1 streams"]["output tokens/s"] > 0
    assert rates["8 streams"]["first token ms"] > 0


SERVED = {"platform": "cpu", "vocab_size": 49152}
GOOD = (-3.35, " Paris.")


def doubt(mean: float, text: str, model: str = "", platform: str = "cpu") -> None:
    seen = {"answer": text}
    verification._doubt(Wanted("cpu", model), {**SERVED, "platform": platform}, mean, text, seen)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: doubt(-3.5, " Paris."), "log-probability of the passage is -3.5000, not -3.3467"),
        (lambda: doubt(-3.35, " the the"), "completes 'The capital of France is' with ' the the'"),
        (lambda: doubt(math.nan, "", "other"), "is nan; chance is -10.8"),
        (lambda: doubt(-10.9, "", "other"), "is -10.9; chance is -10.8"),
        (lambda: doubt(0.5, "", "other"), "is 0.5; chance"),
        (lambda: doubt(*GOOD, platform="other"), "other served, not cpu"),
    ],
)
def test_what_cannot_be_right_is_found(call: Callable[[], None], message: str) -> None:
    with pytest.raises(WrongAnswer, match=message) as raised:
        call()
    assert "answer" in raised.value.seen


def test_what_can_be_right_passes() -> None:
    doubt(*GOOD)
    doubt(-6.0, " of the world", "other")


def test_a_request_that_is_refused_is_the_reason(toy: Running) -> None:
    with pytest.raises(SixfoldError, match="HTTP 404"):
        verification._json(toy.http.get("/v1/nothing"))


def checked(*verdicts: Verdict) -> str:
    kernels = [{"status": v.status, **asdict(v)} for v in verdicts]
    executed = sum(v.executed for v in verdicts)
    return json.dumps({"executed": executed, "evidence": "device: a backend", "kernels": kernels})


def test_what_the_suite_says_is_counted() -> None:
    right, refused = (
        Verdict("silu_mul", "fast", passed=3),
        Verdict("rope", "fast", refused={"a": 1}),
    )
    result = verification.of_check(checked(right, refused), "", 0)
    assert (result.state, result.evidence) == ("passed", "device")
    assert result.figures == {"cases": 3, "kernels": 2, "unverified": 0, "unsupported": 1}
    wrong = Verdict(
        "rope", "slow", passed=1, failed=1, failures=[Failure("one", "float32", 1, "x")]
    )
    result = verification.of_check(checked(right, wrong), "", 1)
    assert (result.state, result.reason) == ("failed", "failed: rope slow")


def test_a_suite_of_nothing_and_one_that_ended_its_process_fail() -> None:
    nothing = verification.of_check(checked(), "Error: No case ran at all", 1)
    assert (nothing.state, nothing.reason) == ("failed", "Error: No case ran at all")
    ended = verification.of_check("", "running rope\nrunning moe\n", -11)
    assert ended.reason == "ended with status -11: running rope / running moe"


def test_a_server_that_does_not_start_fails_what_was_to_be_asked() -> None:
    parts = dict(verification.run(Wanted("cpu", model="/no/such/model"), ["answers", "speed"]))
    assert list(parts) == ["answers", "speed"]
    for result in parts.values():
        assert result.state == "failed"
        assert "the server did not start: it ended" in result.reason
        assert "/no/such/model" in result.reason


def test_a_part_that_raises_is_a_result_and_the_server_is_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Stopped:
        alive, cold_start_s = False, 2.0
        peer = type("Peer", (), {"api": "http://127.0.0.1:1"})()
        stopped = False

        def failure(self, what: str) -> str:
            return f"{what}; the end of the log"

    server = Stopped()
    monkeypatch.setattr(verification, "start", lambda *args: server)
    monkeypatch.setattr(verification, "stop", lambda servers: setattr(servers[0], "stopped", True))
    ((name, result),) = verification.run(Wanted("cpu"), ["answers"])
    assert (name, result.state) == ("answers", "failed")
    assert result.reason.startswith("the server ended (ConnectError")
    assert result.figures == {"seconds to start": 2.0}
    assert server.stopped


class Joining:
    """A platform of several devices, whose check gives what it is told."""

    name = "joining"

    def __init__(self, found: CollectivesFound | SixfoldError) -> None:
        self.found = found

    def check_collectives(self, devices: Sequence[DeviceFacts]) -> CollectivesFound:
        if isinstance(self.found, SixfoldError):
            raise self.found
        return replace(self.found, devices=len(devices))


@pytest.mark.parametrize(
    ("platform", "devices", "state", "reason"),
    [
        (Joining(CollectivesFound("ring", 0, 9)), 3, "passed", ""),
        (Joining(CollectivesFound("ring", 0, 9)), 1, "skipped", "one device: nothing to join"),
        (Joining(CollectivesFound("ring", 0, 0)), 2, "failed", "no case ran"),
        (Joining(CollectivesFound("", 0, 9, ("rank 1: x", "rank 0: y"))), 2, "failed",
         "rank 1: x; rank 0: y"),
        (Joining(PlatformError("no library")), 2, "failed", "no library"),
        (ToyPlatform(), 2, "skipped", "the platform toy joins no devices; it has 2"),
    ],
)  # fmt: skip
def test_devices_are_joined_where_there_are_several(
    platform: Any, devices: int, state: str, reason: str
) -> None:
    result = verification.collectives(platform, [FACTS] * devices)
    assert (result.state, result.reason) == (state, reason)
    if state == "passed":
        line = command.line_of("collectives", result)
        assert line.endswith("9 cases on 3 devices over ring")


def test_one_device_is_said_to_have_nothing_to_join() -> None:
    ((name, result),) = verification.run(Wanted("cpu"), ["collectives"])
    assert (name, result.reason) == ("collectives", "one device: nothing to join")


@pytest.fixture
def invoked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    def run(*arguments: str, **results: Result) -> Any:
        monkeypatch.setattr(verification, "run", lambda wanted, parts: iter(results.items()))
        given = ["--platform", "cpu", "--out", str(tmp_path / "report.json"), *arguments]
        return CliRunner().invoke(command.verify, given)

    return run


KERNELS = Result("device", "passed", "", 1.0, {"cases": 5, "kernels": 2})


def test_the_command_writes_its_report_and_says_where(invoked: Any, tmp_path: Path) -> None:
    done = invoked(kernels=KERNELS)
    assert done.exit_code == 0, done.output
    assert "kernels     passed      1.0 s   5 cases on 2 kernels" in done.output
    assert f"to send back: {tmp_path / 'report.json'}" in done.output
    report = read(tmp_path / "report.json")
    assert report.results["kernels"].figures == KERNELS.figures
    assert report.facts["device"]["kind"] == "cpu"


def test_a_failure_is_the_commands_exit_status(invoked: Any, tmp_path: Path) -> None:
    done = invoked(kernels=KERNELS, answers=Result("device", "failed", "the model said no"))
    assert done.exit_code == 1
    assert "answers     FAILED      0.0 s   the model said no" in done.output
    assert read(tmp_path / "report.json").failed == ["answers"]


def test_an_unknown_part_and_an_absent_platform_are_refused(invoked: Any) -> None:
    unknown = invoked("--workloads", "kernels,speeed").exception
    assert isinstance(unknown, ConfigError)
    assert "no part speeed; there are kernels, answers, speed, collectives" in str(unknown)
    absent = CliRunner().invoke(command.verify, ["--platform", "abacus"]).exception
    assert isinstance(absent, PlatformError)


def test_the_demo_models_right_answers_are_those_of_float32(tmp_path: Path) -> None:
    """The whole command, and the figure that every platform is compared with."""
    out = tmp_path / "report.json"
    done = subprocess.run(
        [sys.executable, "-m", "sixfold", "verify", "--platform", "cpu", "--dtype", "float32",
         "--workloads", "answers", "--out", str(out)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    figures = read(out).results["answers"].figures
    assert figures["mean log-probability"] == pytest.approx(verification.DEMO_MEAN, abs=0.002)
    assert figures["of 8 at a time equal"] == 8
