"""docs/hardware-status.md, from the matrix and the reports that are kept in ci/reports.

    python ci/hardware_status.py --add FILE ...   keep these reports, of `sixfold verify` or
                                                  `ci/run_platform`, and renew the page
    python ci/hardware_status.py --write          renew the page
    python ci/hardware_status.py --check          fail when the page is another, or the matrix wrong

A kept report has no details, and is dropped when newer ones have all its checks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matrix
from matrix import KINDS, ROOT, Check, Feature, Matrix, MatrixError, Note, Row

from sixfold.common.errors import ConfigError
from sixfold.common.evidence import Report, Result, read

REPORTS = ROOT / "ci" / "reports"
PAGE = ROOT / "docs" / "hardware-status.md"
HEAD = """# Hardware status

What was really seen, per platform and feature. `python ci/hardware_status.py --write` makes this page from `ci/matrix.toml`, `ci/notes.toml` and the reports in `ci/reports/`; do not edit it.
To add what your machine shows: run `sixfold verify` ([how](platforms/README.md)) and send its file; `--add FILE` keeps it.

Kinds of evidence, the strongest first:
"""  # noqa: E501
NOTHING = "-"
LEGEND = """
*by hand*: noted by whoever ran it, not by a kept report. *not yet*: there is a check, and no report of it. *none*: there is no check; the section below says why.
"""  # noqa: E501


def reports(folder: Path = REPORTS) -> list[Report]:
    """The newest last. Raises ConfigError for a file that is none."""
    return sorted((read(path) for path in folder.glob("*.json")), key=lambda r: r.began)


def speaks_of(report: Report, check: Check, row: Row) -> bool:
    """Whether a report's result of the check is one of the row."""
    if not check.is_of(row) or report.platform not in check.platforms:
        return False
    if check.shared:
        return True
    if check.about:
        return report.platform == row.platform
    return row.holds(report.platform, report.machine)


def newest(kept: Sequence[Report], check: Check, row: Row) -> tuple[Report, Result] | None:
    """The last that ran; where none did, the last that was skipped."""
    found = [(r, r.results[check.name]) for r in kept if check.name in r.results]
    found = [(report, result) for report, result in found if speaks_of(report, check, row)]
    ran = [pair for pair in found if pair[1].state != "skipped"]
    return (ran or found or [None])[-1]


def page(of: Matrix, kept: Sequence[Report]) -> str:
    """Raises MatrixError where the matrix has faults: a cell would be blank, a row missing."""
    if found := matrix.faults(of):
        raise MatrixError("\n".join(found))
    kinds = [f"- **{kind}**: {of.evidence[kind]}" for kind in KINDS]
    titles = ["platform", *(feature.title for feature in of.features)]
    lines = [_row(titles), "|---" * len(titles) + "|"]
    for row in of.rows:
        lines.append(_row([row.title, *(cell(of, kept, row, f) for f in of.features)]))
    sections = [section(of, kept, row) for row in of.rows]
    parts = [HEAD + "\n".join(kinds) + "\n" + LEGEND, "\n".join(lines) + "\n", of.remarks.strip()]
    return "\n".join([*parts, *sections]) + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def cell(of: Matrix, kept: Sequence[Report], row: Row, feature: Feature) -> str:
    """Every kind of evidence that there is, the strongest first."""
    checks = [check for check in of.checks if check.feature == feature.name and check.is_of(row)]
    results = [pair[1] for check in checks if (pair := newest(kept, check, row))]
    words = {}
    for kind in KINDS:
        states = {result.state for result in results if result.evidence == kind}
        hand = [n for n in _notes(of, row, feature) if n.evidence == kind]
        if "failed" in states:
            words[kind] = f"**{kind}: failed**"
        elif "passed" in states:
            words[kind] = kind
        elif hand:
            words[kind] = f"{kind} (by hand)"
    return ", ".join(words.values()) or ("not yet" if checks else "none")


def _notes(of: Matrix, row: Row, feature: Feature) -> list[Note]:
    return [note for note in of.notes if note.feature == feature.name and note.is_of(row)]


def section(of: Matrix, kept: Sequence[Report], row: Row) -> str:
    lines = [f"\n## {row.title}\n"]
    lines += [_row(["feature", "what", "evidence", "result", "seen", "command"]), "|---" * 6 + "|"]
    used: dict[str, Report] = {}
    for feature in of.features:
        shown = []
        for check in of.checks:
            if check.feature == feature.name and check.is_of(row):
                pair = newest(kept, check, row)
                if pair is not None:
                    used[pair[0].began] = pair[0]
                shown.append(check_cells(check, row, pair))
        shown += [note_cells(note) for note in _notes(of, row, feature)]
        lines += [_row([feature.title, *cells]) for cells in shown]
    return "\n".join([*lines, *machines([used[began] for began in sorted(used)])])


def check_cells(check: Check, row: Row, pair: tuple[Report, Result] | None) -> list[str]:
    runs_on = check.platforms[0] if check.shared else row.platform
    command = f"`ci/run_platform {runs_on} --checks {check.name}`"
    if pair is None:
        return [check.name, check.evidence, "not yet", NOTHING, command]
    report, result = pair
    state = f"**{result.state}**" if result.state == "failed" else result.state
    seen = "; ".join(filter(None, (result.reason, said(result.figures))))
    result_words = f"{state} {report.began[:10]}"
    return [check.name, result.evidence, result_words, plain(seen) or NOTHING, command]


def note_cells(note: Note) -> list[str]:
    if not note.evidence:
        return [note.what, "none", NOTHING, NOTHING, NOTHING]
    command = f"`{note.command}`"
    return [note.what, note.evidence, f"by hand {note.date}", note.seen, command]


def said(figures: Mapping[str, Any]) -> str:
    parts = []
    for name, value in figures.items():
        if value == "":
            continue
        text = f"({said(value)})" if isinstance(value, Mapping) else f"{value}"
        parts.append(f"{name} {text}")
    return ", ".join(parts)


def plain(text: str) -> str:
    """As one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")[:400]


def machines(used: Sequence[Report]) -> list[str]:
    """Where and with what: one line for each kind of machine, source and set of versions."""
    lines = []
    for r in used:
        versions = ", ".join(f"{n} {v}" for n, v in r.versions.items() if n != "sixfold")
        device = r.facts["device"].get("name", "no device")
        on = f"{r.facts['system']}, {r.facts['processor']}, {r.facts['cores']} cores; {device}"
        lines.append(f"- {r.began[:10]}, {r.source}: {on}; {versions}")
    return ["", *dict.fromkeys(lines)] if lines else []


def keep(of: Matrix, path: Path, folder: Path = REPORTS) -> Path:
    """Raises MatrixError for a report of a platform or a check that the matrix does not know."""
    report = read(path)
    of.row(report.platform, report.machine)
    for name in report.results:
        of.check(name)
    stamp = report.began.replace("-", "").replace(":", "")
    target = folder / f"{report.platform}-{report.machine}-{stamp}.json"
    report.write(target, details=False)
    return target


def drop_superseded(of: Matrix, folder: Path = REPORTS) -> list[Path]:
    """Files of which no result is the newest of any row."""
    files = {path: read(path) for path in folder.glob("*.json")}
    kept = sorted(files.values(), key=lambda report: report.began)
    pairs = [newest(kept, check, row) for row in of.rows for check in of.checks]
    used = [pair[0] for pair in pairs if pair]
    gone = [path for path, report in files.items() if not any(report is one for one in used)]
    for path in gone:
        path.unlink()
    return gone


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--add", type=Path, nargs="+", metavar="FILE")
    mode.add_argument("--write", action="store_true")
    mode.add_argument("--check", action="store_true")
    asked = parser.parse_args()
    try:
        of = matrix.load()
        for path in asked.add or ():
            print(f"kept as {keep(of, path).relative_to(ROOT)}")
        if asked.add:
            for path in drop_superseded(of):
                print(f"superseded: {path.relative_to(ROOT)}")
        text = page(of, reports())
    except (MatrixError, ConfigError) as error:
        print(error, file=sys.stderr)
        return 1
    if not asked.check:
        PAGE.write_text(text, "utf-8")
    elif PAGE.read_text("utf-8") != text:
        print("docs/hardware-status.md is not what `ci/hardware_status.py --write` makes of it")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
