"""The workflows of .github/workflows, from the matrix: one file a platform, one job a machine; and
`.github/actionlint.yaml`, which tells actionlint the labels of machines of one's own.

    python ci/workflows.py --write     make them, and remove any other
    python ci/workflows.py --check     fail when one is different, missing or too many

Hosted machines run at every push. A machine of one's own is never given a pull request's code: its
job runs by hand, and at pushes once the repository's variable RUNNER_<PLATFORM> is "yes".
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import matrix
from matrix import ROOT, Job, Matrix, Row

FOLDER = ROOT / ".github" / "workflows"
LABELS = "actionlint.yaml"
COMMON_LABELS = frozenset({"self-hosted", "linux"})
LONGEST = 350
"""Minutes: a hosted job ends after 360."""
MADE = "# Made by `python ci/workflows.py --write` from ci/matrix.toml; do not edit.\n"
HEAD = """{made}name: {platform}
on: [push, pull_request, workflow_dispatch]
permissions:
  contents: read
concurrency:
  group: {platform}-${{{{ github.ref }}}}
  cancel-in-progress: true
jobs:
"""
JOB = """  {name}:
    runs-on: {labels}
    timeout-minutes: {minutes}
{condition}    steps:
      - uses: actions/checkout@v4
{steps}      - name: Checks
        run: ci/run_platform {platform} --evidence {evidence} --out report.json
        env:
          PYTHON: {python}
      - uses: actions/upload-artifact@v4
        if: always()
        with:
          name: {platform}-{name}
          path: "*.json"
"""
CONDITION = (
    "    if: github.event_name == 'workflow_dispatch' || "
    "(github.event_name == 'push' && vars.{variable} == 'yes')\n"
)
PYTHON_STEP = """      - uses: actions/setup-python@v5
        with:
          python-version: "3.12"
"""
OWN_PYTHON = ".venv/bin/python"


def workflows(of: Matrix) -> dict[str, str]:
    """File name -> text."""
    return {
        f"{name}.yml": workflow(of, name) for name in dict.fromkeys(r.platform for r in of.rows)
    }


def workflow(of: Matrix, platform: str) -> str:
    rows = [row for row in of.rows if row.platform == platform]
    jobs = [job_text(of, row, job) for row in rows for job in row.jobs]
    return HEAD.format(made=MADE, platform=platform) + "".join(jobs)


def job_text(of: Matrix, row: Row, job: Job) -> str:
    variable = f"RUNNER_{row.platform.upper()}"
    return JOB.format(
        name=job_name(job),
        labels=job.runs_on[0] if job.hosted else f"[{', '.join(job.runs_on)}]",
        minutes=min(LONGEST, 20 + sum(check_minutes(of, row, job))),
        condition="" if job.hosted else CONDITION.format(variable=variable),
        steps="".join(steps(row, job)),
        platform=row.platform,
        evidence=",".join(job.evidence),
        python="python" if job.hosted else OWN_PYTHON,
    )


def job_name(job: Job) -> str:
    return job.runs_on[0].replace(".", "-") if job.hosted else "device"


def check_minutes(of: Matrix, row: Row, job: Job) -> Iterator[int]:
    for check in of.checks:
        shared_elsewhere = check.shared and check.platforms[0] != row.platform
        own = row.platform in check.platforms and check.runs_at(row.machine or "linux-x86_64")
        if own and check.evidence in job.evidence and not shared_elsewhere:
            yield check.minutes


def steps(row: Row, job: Job) -> Iterator[str]:
    """Of the installation. On a machine of one's own the framework may come with it."""
    if not job.hosted:
        yield step("Environment", "python3 -m venv --system-site-packages .venv")
        yield step("Install", f"{OWN_PYTHON} ci/install.py demo test --platform {row.platform}")
        yield step("What it finds", ".venv/bin/sixfold doctor")
        return
    yield PYTHON_STEP
    if job.packages:
        packages = f"sudo apt-get update -qq && sudo apt-get install -y -qq {job.packages}"
        yield step("System packages", packages)
    if job.lean:
        yield from lean_steps(row, job.lean)
    else:
        yield step("Install", "python ci/install.py demo test dev --platform cpu")
    yield step("What it finds", "sixfold doctor")


def lean_steps(row: Row, absent: str) -> Iterator[str]:
    """What a user installs, seen to serve; then what the tests need besides."""
    name = row.platform
    yield step("Install as a user does", f"python ci/install.py demo --platform {name}")
    missing = (
        f"import importlib.util, sys; sys.exit(importlib.util.find_spec('{absent}') is not None)"
    )
    yield step(f"No {absent} in this install", f'python -c "{missing}"')
    yield step("Every decision", "sixfold serve --explain")
    yield step("As a user verifies", f"sixfold verify --platform {name} --out verify.json")
    yield step("Install the tests", f"python ci/install.py demo test --platform {name}")
    yield step("Their oracles", f"python -m pip install --quiet {absent}")


def step(name: str, command: str) -> str:
    return f"      - name: {name}\n        run: {command}\n"


def own_labels(of: Matrix) -> list[str]:
    """Labels that GitHub does not know, of machines that are not its own."""
    own = [set(job.runs_on) for row in of.rows for job in row.jobs if not job.hosted]
    return sorted(set().union(*own) - COMMON_LABELS)


def labels_file(of: Matrix) -> str:
    lines = "".join(f"    - {label}\n" for label in own_labels(of))
    return f"{MADE}self-hosted-runner:\n  labels:\n{lines}"


def texts(of: Matrix, folder: Path) -> dict[Path, str]:
    """All that is made, by path. `folder` holds the workflows."""
    made = {folder / name: text for name, text in workflows(of).items()}
    return {**made, folder.parent / LABELS: labels_file(of)}


def differences(of: Matrix, folder: Path = FOLDER) -> list[str]:
    wanted = texts(of, folder)
    found = [f"{path.name} is missing" for path in sorted(wanted) if not path.exists()]
    found += [
        f"{path.name} is not made from the matrix"
        for path in sorted(folder.glob("*.y*ml"))
        if path not in wanted
    ]
    return found + [
        f"{path.name} is not what the matrix makes"
        for path, text in wanted.items()
        if path.exists() and path.read_text("utf-8") != text
    ]


def write(of: Matrix, folder: Path = FOLDER) -> None:
    wanted = texts(of, folder)
    for path in folder.glob("*.y*ml"):
        if path not in wanted:
            path.unlink()
    for path, text in wanted.items():
        path.write_text(text, "utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--write", action="store_true")
    mode.add_argument("--check", action="store_true")
    of = matrix.load()
    if parser.parse_args().write:
        write(of)
    found = differences(of)
    print("\n".join(found) or f"{len(workflows(of))} workflows are what the matrix makes")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
