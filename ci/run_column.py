"""The checks of one platform, run on this machine: what `ci/run_platform` does."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import matrix
from matrix import KINDS, ROOT, Check, Matrix, MatrixError
from run_check import Place, run_check

from sixfold import __version__
from sixfold.common import evidence
from sixfold.common.evidence import Report, Result
from sixfold.platforms import machine as machines
from sixfold.platforms import select

OPENBLAS = "openblas-pthread/libblas.so.3"


def run(asked: argparse.Namespace) -> Report | None:
    """The report, written to its file; None where only the list was asked for. Raises
    MatrixError."""
    machine = machines.observe()
    probe = select.probe_all(machine).get(asked.platform)
    if probe is None:
        raise MatrixError(f"no platform {asked.platform}; there are {', '.join(matrix.IN_TREE)}")
    name = evidence.machine_name(machine)
    checks = chosen(matrix.load(), asked.platform, name, probe.usable, asked)
    if asked.list:
        for check in checks:
            print(f"{check.name:20s} {check.evidence:12s} at most {check.minutes} minutes")
        return None
    report = Report(
        asked.platform,
        name,
        datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        commit(),
        evidence.versions(machine, __version__),
        evidence.facts(machine, probe),
    )
    path = asked.out or Path(f"sixfold-{asked.platform}.json")
    absent = "" if probe.usable else f"no device: {probe.reason}"
    run_all(checks, report, path, absent, asked.small)
    print(f"written to {path}")
    return report


def run_all(
    checks: Sequence[Check], report: Report, path: Path, absent: str, small: bool = False
) -> None:
    """`absent`: why there is no device, "" where there is one."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "sixfold").symlink_to(ROOT)
        place = Place(report.platform, Path(folder), preload(report.platform), small)
        for check in checks:
            if absent and check.evidence == "device":
                result = Result("device", "skipped", absent)
            else:
                result = run_check(check, place)
            report.results[check.name] = result
            report.write(path)
            print(line(check.name, result), flush=True)


def line(name: str, result: Result) -> str:
    state = result.state.upper() if result.state == "failed" else result.state
    figures = [f"{k} {v}" for k, v in result.figures.items() if isinstance(v, (int, float))]
    said = result.reason or ", ".join(figures)
    return f"{name:20s} {result.evidence:12s} {state:8s} {result.seconds:7.1f} s  {said}"


def chosen(
    of: Matrix, platform: str, machine: str, device: bool, asked: argparse.Namespace
) -> list[Check]:
    """The checks to run, the strongest evidence first. Raises MatrixError for what there is not."""
    names, kinds = ([x for x in text.split(",") if x] for text in (asked.checks, asked.evidence))
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise MatrixError(f"no kind {', '.join(unknown)}; there are {', '.join(KINDS)}")
    own = [c for c in of.checks if platform in c.platforms and c.runs_at(machine)]
    if unknown := [name for name in names if name not in [check.name for check in own]]:
        listed = ", ".join(check.name for check in own)
        raise MatrixError(f"{platform} has no check {', '.join(unknown)} here; it has {listed}")
    if names:
        own = [check for check in own if check.name in names]
    else:
        kinds = kinds or list(usual_kinds(of, platform, machine, device))
        own = [check for check in own if not check.shared or check.platforms[0] == platform]
    found = [check for check in own if not kinds or check.evidence in kinds]
    return sorted(found, key=lambda check: KINDS.index(check.evidence))


def usual_kinds(of: Matrix, platform: str, machine: str, device: bool) -> Sequence[str]:
    """Of the row's jobs, those of the one that this machine can do."""
    for job in of.row(platform, machine).jobs:
        if ("device" in job.evidence) == device:
            return job.evidence
    raise MatrixError(f"{platform} has no check without its device, which is not here")


def preload(platform: str) -> str:
    """OpenBLAS under MLX's CPU backend, where it is installed: its own is many times slower."""
    if platform != "mlx" or sys.platform != "linux":
        return ""
    return next((str(path) for path in Path("/usr/lib").glob(f"*/{OPENBLAS}")), "")


def commit() -> str:
    """Of the checkout; "+" behind it: with changes."""

    def git(*command: str) -> str:
        done = subprocess.run(
            ["git", *command], cwd=ROOT, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    changes = git("status", "--porcelain", "--untracked-files=no")
    return f"commit {git('rev-parse', '--short', 'HEAD') or 'unknown'}{'+' if changes else ''}"
