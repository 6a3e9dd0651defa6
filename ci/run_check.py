"""One check of the matrix, in a process of its own, and what its output says."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matrix
from matrix import ROOT, Check, MatrixError

from sixfold.common.errors import ConfigError
from sixfold.common.evidence import Result, read
from sixfold.server.verification import of_check


@dataclass(frozen=True)
class Place:
    """Where checks are run: the platform, and a folder that holds `sixfold`, the checkout."""

    platform: str
    folder: Path
    preload: str = ""  # a library: MLX's wheel for Linux brings a slow BLAS
    small: bool = False  # stages at tiny sizes


@dataclass(frozen=True)
class Ended:
    status: int
    stdout: str
    stderr: str

    @property
    def last_words(self) -> str:
        text = self.stderr.strip() or self.stdout.strip()
        return f"status {self.status}: " + " / ".join(text.splitlines()[-4:])[-1500:]


class TookTooLong(Exception):
    """The sentence says how long."""


def run_check(check: Check, place: Place) -> Result:
    """Never raises: what goes wrong is the result."""
    lacking = [name for name in check.needs if not _has(name)]
    if lacking:
        return Result(check.evidence, "skipped", f"{', '.join(lacking)} not installed")
    began = time.perf_counter()
    try:
        result = _way(check)(check.on(place.platform), place)
    except (TookTooLong, MatrixError, ConfigError, OSError) as error:
        result = Result(check.evidence, "failed", str(error))
    took = round(time.perf_counter() - began, 1)
    return replace(result, reason=_without_paths(result.reason), seconds=took)


def _has(name: str) -> bool:
    return shutil.which(name) is not None or importlib.util.find_spec(name) is not None


def _without_paths(text: str) -> str:
    """Reports are kept: they do not tell where a checkout or an environment stood."""
    for path, word in ((str(ROOT), "."), (sys.prefix, "ENVIRONMENT"), (str(Path.home()), "~")):
        text = text.replace(path, word)
    return text


Way = Callable[[Check, Place], Result]


def _way(check: Check) -> Way:
    ways: dict[str, Way] = {
        "tests": _tests,
        "stage": _stage,
        "verify": _verify,
        "contracts": _contracts,
        "script": _script,
    }
    return next(way for name, way in ways.items() if getattr(check, name))


def _tests(check: Check, place: Place) -> Result:
    with _file(".xml") as answer:
        command = ["-m", "pytest", "-p", "no:cacheprovider", "--junitxml", str(answer)]
        command += ["--override-ini", "addopts=--import-mode=importlib -q --strict-markers"]
        command += check.options
        if place.platform in check.select:
            command += ["-k", check.select[place.platform]]
        ended = _python([*command, *sorted(matrix.files_of(check))], check, place)
        text = answer.read_text("utf-8")
    if not text:
        return Result(check.evidence, "failed", ended.last_words)
    return of_tests(check.evidence, text, ended.last_words)


def of_tests(evidence: str, text: str, last_words: str) -> Result:
    """From pytest's XML. Where nothing ran that is said, with the reasons of what was skipped."""
    suite = next(ElementTree.fromstring(text).iter("testsuite"))
    count = {name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")}
    bad = count["failures"] + count["errors"]
    passed = count["tests"] - bad - count["skipped"]
    reasons = {one.get("message", ""): None for one in suite.iter("skipped")}
    slowest = sorted(suite.iter("testcase"), key=lambda case: -float(case.get("time", "0")))[:3]
    details = {
        "failed": [
            f"{case.get('classname')}::{case.get('name')}"
            for case in suite.iter("testcase")
            if case.find("failure") is not None or case.find("error") is not None
        ],
        "skipped": list(reasons),
        "slowest": {str(case.get("name")): float(case.get("time", "0")) for case in slowest},
    }
    figures = {"passed": passed, "failed": bad, "skipped": count["skipped"]}
    if bad:
        reason = f"{bad} failed: {', '.join(details['failed'][:5])}"
        return Result(evidence, "failed", reason, 0.0, figures, details)
    if not count["tests"]:
        return Result(evidence, "failed", f"no test was found: {last_words}", 0.0, figures)
    state = "passed" if passed else "skipped"
    reason = "" if passed else "; ".join(reasons)[:1000]
    return Result(evidence, state, reason, 0.0, figures, details)


def _stage(check: Check, place: Place) -> Result:
    with _file(".json") as answer:
        command = [str(ROOT / "ci" / "run_stage.py"), place.platform, check.stage, str(answer)]
        ended = _python([*command, *(["--small"] if place.small else [])], check, place)
        text = answer.read_text("utf-8")
    if not text:
        return Result(check.evidence, "failed", f"ended with {ended.last_words}")
    found = dict(json.loads(text))
    if reason := found.get("no device"):
        return Result(check.evidence, "skipped", reason)
    reason = "" if found.pop("ok") else found.get("error", "what it found is not right")
    state = "failed" if reason else "passed"
    return Result(check.evidence, state, reason, 0.0, _few(found), found)


def _few(found: dict[str, Any]) -> dict[str, Any]:
    """Of a stage's answer what is not a table."""
    return {name: v for name, v in found.items() if not isinstance(v, (list, dict))}


def _verify(check: Check, place: Place) -> Result:
    with _file(".json") as answer:
        command = ["-m", "sixfold", "verify", "--platform", place.platform]
        ended = _python([*command, "--workloads", check.verify, "--out", str(answer)], check, place)
        try:
            return next(iter(read(answer).results.values()))
        except (ConfigError, StopIteration):
            return Result(check.evidence, "failed", ended.last_words)


def _contracts(check: Check, place: Place) -> Result:
    start = ["-m", "sixfold", "check"]
    if check.evidence == "emulated":
        start = [str(ROOT / "ci" / "emulated_check.py")]
    ended = _python([*start, "--json", *check.contracts], check, place)
    return of_check(ended.stdout, ended.stderr, ended.status)


def _script(check: Check, place: Place) -> Result:
    ended = _python([str(ROOT / check.script[0]), *check.script[1:]], check, place)
    said = ended.stdout.strip().splitlines()[-3:]
    if ended.status:
        return Result(check.evidence, "failed", ended.last_words)
    return Result(check.evidence, "passed", figures={"said": _without_paths(" / ".join(said))})


@contextlib.contextmanager
def _file(ending: str) -> Iterator[Path]:
    with tempfile.NamedTemporaryFile(suffix=ending) as file:
        yield Path(file.name)


def _python(arguments: list[str], check: Check, place: Place) -> Ended:
    """In a session of its own, so that what it started ends with it. Raises TookTooLong."""
    environment = {**os.environ, **check.environment, "PYTHONPATH": str(place.folder)}
    if place.preload:
        environment |= {"LD_PRELOAD": place.preload, "OPENBLAS_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        stdout, stderr = process.communicate(timeout=60 * check.minutes)
    except BaseException as error:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            raise TookTooLong(f"took longer than {check.minutes} minutes") from None
        raise
    return Ended(process.returncode, stdout, stderr)
