"""The matrix of platforms and checks: ci/matrix.toml and ci/notes.toml, read and judged.

`faults` finds what must not be: a test file that no check runs, a pattern that matches nothing, a
platform without a row, a cell of which nothing is said.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def use_checkout() -> None:
    """Makes `import sixfold` give this checkout, whatever its folder is called."""
    if "sixfold" in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(
        "sixfold", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"{ROOT} holds no package")
    module = importlib.util.module_from_spec(spec)
    sys.modules["sixfold"] = module
    spec.loader.exec_module(module)


use_checkout()

from sixfold.common.evidence import KINDS  # noqa: E402 (after the line that finds it)
from sixfold.platforms.select import IN_TREE  # noqa: E402


class MatrixError(Exception):
    """The matrix says something that cannot be."""


@dataclass(frozen=True)
class Job:
    """Where a row's checks run in CI."""

    runs_on: tuple[str, ...]
    evidence: tuple[str, ...]
    packages: str = ""  # of the runner's own package manager
    lean: str = ""  # a module that a user's install must not bring

    @property
    def hosted(self) -> bool:
        return "self-hosted" not in self.runs_on


@dataclass(frozen=True)
class Row:
    platform: str
    title: str
    jobs: tuple[Job, ...]
    machine: str = ""  # "": reports of any machine

    def holds(self, platform: str, machine: str) -> bool:
        return self.platform == platform and self.machine in ("", machine)


@dataclass(frozen=True)
class Feature:
    name: str
    title: str


@dataclass(frozen=True)
class Check:
    """Exactly one of `tests`, `stage`, `verify`, `contracts` and `script` is given."""

    name: str
    feature: str
    evidence: str
    platforms: tuple[str, ...]
    machines: tuple[str, ...] = ()
    about: str = ""
    tests: tuple[str, ...] = ()
    except_: tuple[str, ...] = ()
    select: dict[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    stage: str = ""
    verify: str = ""
    contracts: tuple[str, ...] = ()
    script: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    same_as: tuple[str, ...] = ()
    shared: bool = False  # the result of one platform's run is that of all its platforms
    minutes: int = 10  # after which it is stopped

    def on(self, platform: str) -> Check:
        """With {platform} filled in."""

        def fill(texts: Sequence[str]) -> tuple[str, ...]:
            return tuple(text.replace("{platform}", platform) for text in texts)

        return replace(self, options=fill(self.options), contracts=fill(self.contracts))

    def is_of(self, row: Row) -> bool:
        """Whether its results say something of the row."""
        if row.platform not in self.platforms:
            return False
        places = (self.about,) if self.about else self.machines
        return not row.machine or not places or row.machine in places

    def runs_at(self, machine: str) -> bool:
        return not self.machines or machine in self.machines


@dataclass(frozen=True)
class Note:
    """Written by hand: what was seen without a check, or why there is none."""

    platforms: tuple[str, ...]
    feature: str
    what: str
    evidence: str = ""  # "": why there is nothing
    machines: tuple[str, ...] = ()
    date: str = ""
    command: str = ""
    seen: str = ""

    def is_of(self, row: Row) -> bool:
        return row.platform in self.platforms and (
            not self.machines or row.machine in self.machines
        )


@dataclass(frozen=True)
class Matrix:
    evidence: dict[str, str]
    rows: tuple[Row, ...]
    features: tuple[Feature, ...]
    checks: tuple[Check, ...]
    notes: tuple[Note, ...]
    remarks: str  # the status page's own text

    def check(self, name: str) -> Check:
        for check in self.checks:
            if check.name == name:
                return check
        names = ", ".join(check.name for check in self.checks)
        raise MatrixError(f"There is no check {name!r}; there are {names}.")

    def row(self, platform: str, machine: str) -> Row:
        for row in self.rows:
            if row.holds(platform, machine):
                return row
        rows = ", ".join(f"{row.platform} {row.machine}".strip() for row in self.rows)
        raise MatrixError(f"No row is for {platform} on {machine}; there are {rows}.")


def load(folder: Path = ROOT / "ci") -> Matrix:
    """Raises MatrixError for an entry that has a field that it cannot have, or lacks one."""
    plain = tomllib.loads((folder / "matrix.toml").read_text("utf-8"))
    notes = tomllib.loads((folder / "notes.toml").read_text("utf-8"))
    for row in plain["row"]:
        row["jobs"] = tuple(_entry(Job, job) for job in row["jobs"])
    return Matrix(
        plain["evidence"],
        tuple(_entry(Row, row) for row in plain["row"]),
        tuple(_entry(Feature, feature) for feature in plain["feature"]),
        tuple(_entry(Check, check) for check in plain["check"]),
        tuple(_entry(Note, note) for note in notes["note"]),
        notes["remarks"],
    )


def _entry(kind: Any, plain: dict[str, Any]) -> Any:
    given = {
        "except_" if name == "except" else name: tuple(v) if isinstance(v, list) else v
        for name, v in plain.items()
    }
    try:
        return kind(**given)
    except TypeError as error:
        raise MatrixError(f"{kind.__name__} {plain.get('name', plain)}: {error}") from None


def all_test_files(root: Path = ROOT) -> set[str]:
    return {str(p.relative_to(root)) for p in (root / "tests").rglob("test_*.py")}


def files_of(check: Check, root: Path = ROOT) -> set[str]:
    """The test files that a check runs. Raises MatrixError for a pattern that matches nothing."""
    return _matched(check.tests, root) - _matched(check.except_, root)


def _matched(patterns: Sequence[str], root: Path) -> set[str]:
    found: set[str] = set()
    for pattern in patterns:
        paths = [f for p in root.glob(pattern) for f in ([p] if p.is_file() else _below(p))]
        if not paths:
            raise MatrixError(f"{pattern} matches no test file")
        found |= {str(path.relative_to(root)) for path in paths}
    return found


def _below(folder: Path) -> list[Path]:
    return list(folder.rglob("test_*.py"))


def faults(matrix: Matrix, root: Path = ROOT) -> list[str]:
    """Everything that is wrong with the matrix, one sentence each."""
    return [*_bad_names(matrix), *_files_not_run(matrix, root), *_rows_and_cells(matrix, root)]


def _files_not_run(matrix: Matrix, root: Path) -> list[str]:
    run: set[str] = set()
    found = []
    for check in matrix.checks:
        try:
            run |= files_of(check, root) | _matched(check.same_as, root)
        except MatrixError as error:
            found.append(f"check {check.name}: {error}")
    return found + [f"{file} is run by no check" for file in sorted(all_test_files(root) - run)]


def _rows_and_cells(matrix: Matrix, root: Path) -> list[str]:
    rows = [row.platform for row in matrix.rows]
    found = [f"the platform {name} has no row" for name in IN_TREE if name not in rows]
    for row in matrix.rows:
        for feature in matrix.features:
            entries = (*matrix.checks, *matrix.notes)
            if not any(e.feature == feature.name and e.is_of(row) for e in entries):
                found.append(f"{row.title}, {feature.title}: no check and no note")
    for note in matrix.notes:
        paths = re.findall(r"(?:tests|ci)/[\w/.]+", note.command)
        found += [f"note {note.what!r}: there is no {p}" for p in paths if not (root / p).exists()]
    return found


def _bad_names(matrix: Matrix) -> list[str]:
    features = {feature.name for feature in matrix.features}
    found = [f"{kind} is no kind of evidence" for kind in matrix.evidence if kind not in KINDS]
    found += [f"the kind {kind} is not explained" for kind in KINDS if kind not in matrix.evidence]
    for entry in (*matrix.checks, *matrix.notes):
        name = entry.name if isinstance(entry, Check) else entry.what
        unknown = [p for p in entry.platforms if p not in IN_TREE]
        found += [f"{name}: there is no platform {platform}" for platform in unknown]
        if entry.feature not in features:
            found.append(f"{name}: there is no feature {entry.feature}")
        if entry.evidence not in KINDS and (entry.evidence or isinstance(entry, Check)):
            found.append(f"{name}: {entry.evidence!r} is no kind of evidence")
    for check in matrix.checks:
        ways = (check.tests, check.stage, check.verify, check.contracts, check.script)
        if sum(map(bool, ways)) != 1:
            found.append(
                f"{check.name}: not exactly one of tests, stage, verify, contracts, script"
            )
    names = [check.name for check in matrix.checks]
    return found + [f"two checks are called {n}" for n in sorted(set(names)) if names.count(n) > 1]
