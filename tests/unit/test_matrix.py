"""Guards ci/matrix.toml and what is made from it: every test file is run by a check, every platform
has a row, no cell is blank, the workflows and docs/hardware-status.md are what the matrix and the
kept reports make; and each of these detectors fires."""

from __future__ import annotations

import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "ci"))

import hardware_status  # noqa: E402 (after the line that finds it)
import matrix  # noqa: E402
import workflows  # noqa: E402
from matrix import Matrix, MatrixError  # noqa: E402

from sixfold.common.evidence import Report, Result, read  # noqa: E402


@pytest.fixture(scope="module")
def of() -> Matrix:
    return matrix.load()


def test_the_matrix_has_no_faults(of: Matrix) -> None:
    assert matrix.faults(of) == []


def test_the_workflows_are_what_it_makes(of: Matrix) -> None:
    assert workflows.differences(of) == []


def test_the_status_page_is_what_it_and_the_reports_make(of: Matrix) -> None:
    page = hardware_status.PAGE.read_text("utf-8")
    assert page == hardware_status.page(of, hardware_status.reports())
    cells = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("|")]
    assert all(cell.strip() for line in cells for cell in line)


def test_kept_reports_are_small_and_of_known_checks(of: Matrix) -> None:
    for path in hardware_status.REPORTS.iterdir():
        assert path.stat().st_size < 20_000
        report = read(path)
        assert report.ran, path
        for name, result in report.results.items():
            of.check(name)
            assert not result.details


def copy_of_tests(folder: Path) -> Path:
    """A tree with the same test files, empty, and what notes name."""
    for file in matrix.all_test_files():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    shutil.copytree(ROOT / "ci", folder / "ci", ignore=shutil.ignore_patterns("*.json", "bench"))
    (folder / "ci" / "bench").mkdir()
    (folder / "ci" / "bench" / "quality.py").touch()
    return folder


def test_a_test_file_that_no_check_runs_is_found(of: Matrix, tmp_path: Path) -> None:
    root = copy_of_tests(tmp_path)
    assert matrix.faults(of, root) == []
    (root / "tests" / "new").mkdir()
    for file in ("tests/new/test_lost.py", "tests/unit/test_found.py"):
        (root / file).touch()
    assert matrix.faults(of, root) == ["tests/new/test_lost.py is run by no check"]
    (root / "tests/unit/test_mlx_of_a_pattern.py").touch()
    assert len(matrix.faults(of, root)) == 1


def test_a_file_that_a_check_leaves_out_and_no_other_runs_is_found(of: Matrix) -> None:
    without = replace(of, checks=tuple(c for c in of.checks if c.name != "traced"))
    assert "tests/unit/test_traced_models.py is run by no check" in matrix.faults(without)


def test_a_pattern_that_matches_nothing_is_found(of: Matrix, tmp_path: Path) -> None:
    root = copy_of_tests(tmp_path)
    (root / "tests/unit/test_traced_models.py").unlink()
    found = matrix.faults(of, root)
    assert "check traced: tests/unit/test_traced_models.py matches no test file" in found


@pytest.mark.parametrize("platform", matrix.IN_TREE)
def test_a_platform_whose_row_disappears_is_found(of: Matrix, platform: str) -> None:
    without = replace(of, rows=tuple(row for row in of.rows if row.platform != platform))
    assert matrix.faults(without) == [f"the platform {platform} has no row"]
    with pytest.raises(MatrixError, match=f"the platform {platform} has no row"):
        hardware_status.page(without, [])


def test_a_blank_cell_is_found(of: Matrix) -> None:
    without = replace(of, notes=tuple(n for n in of.notes if n.feature != "compiled"))
    found = matrix.faults(without)
    assert "`npu`, Triton kernels compiled: no check and no note" in found
    assert not any("`cuda`" in fault for fault in found)


def test_names_that_are_none_are_found(of: Matrix) -> None:
    (first, *others) = of.checks
    wrong = replace(first, feature="taste", evidence="rumour", platforms=("abacus",), stage="x")
    found = matrix.faults(replace(of, checks=(wrong, *others, others[0])))
    assert f"{first.name}: there is no feature taste" in found
    assert f"{first.name}: 'rumour' is no kind of evidence" in found
    assert f"{first.name}: there is no platform abacus" in found
    assert any("not exactly one of" in fault for fault in found)
    assert f"two checks are called {others[0].name}" in found
    note = replace(of.notes[-1], what="gone", command="pytest tests/unit/test_gone.py")
    found = matrix.faults(replace(of, notes=(*of.notes, note)))
    assert found == ["note 'gone': there is no tests/unit/test_gone.py"]


def test_a_field_that_there_is_not_is_refused(tmp_path: Path) -> None:
    for name in ("matrix.toml", "notes.toml"):
        text = (ROOT / "ci" / name).read_text("utf-8")
        (tmp_path / name).write_text(text.replace("minutes =", "hours ="), "utf-8")
    with pytest.raises(MatrixError, match=r"Check kernels: .*hours"):
        matrix.load(tmp_path)


# Workflows.


@pytest.fixture
def folder(of: Matrix, tmp_path: Path) -> Path:
    folder = tmp_path / "workflows"
    folder.mkdir()
    workflows.write(of, folder)
    return folder


def test_drift_of_workflows_is_found(of: Matrix, folder: Path) -> None:
    assert workflows.differences(of, folder) == []
    (folder / "npu.yml").unlink()
    (folder / "more.yml").write_text("on: push")
    (folder / "cpu.yml").write_text((folder / "cpu.yml").read_text() + "# by hand\n")
    (folder.parent / "actionlint.yaml").write_text("self-hosted-runner: {}\n")
    assert workflows.differences(of, folder) == [
        "npu.yml is missing",
        "more.yml is not made from the matrix",
        "cpu.yml is not what the matrix makes",
        "actionlint.yaml is not what the matrix makes",
    ]
    workflows.write(of, folder)
    assert workflows.differences(of, folder) == []


@pytest.mark.parametrize("platform", matrix.IN_TREE)
def test_workflows_are_well_formed(of: Matrix, platform: str) -> None:
    """A check of our own: of the keys, the steps and the contexts that GitHub's schema has."""
    text = workflows.workflow(of, platform)
    plain = yaml.safe_load(text)
    assert set(plain) == {"name", True, "permissions", "concurrency", "jobs"}  # `on` is True
    for job in plain["jobs"].values():
        assert {"runs-on", "timeout-minutes", "steps"} <= set(job)
        assert set(job) <= {"runs-on", "timeout-minutes", "steps", "if"}
        assert 0 < job["timeout-minutes"] <= 360
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            assert set(step) <= {"name", "uses", "run", "with", "if", "env"}
    contexts = set(re.findall(r"\b([a-z]+)\.[a-z_A-Z]+ ?(?:==|\}\})", text))
    assert contexts <= {"github", "vars"}


def test_foreign_code_reaches_no_machine_of_ones_own(of: Matrix) -> None:
    """A pull request's event must not start a self-hosted job."""
    found = 0
    for text in workflows.workflows(of).values():
        for job in yaml.safe_load(text)["jobs"].values():
            if "self-hosted" in job["runs-on"]:
                found += 1
                assert "pull_request" not in job["if"]
                assert job["if"].startswith("github.event_name == 'workflow_dispatch' || (")
    assert found == 4


# The status page.


def report(platform: str, began: str = "2026-01-02", machine: str = "linux-x86_64") -> Report:
    facts = {"system": "A system", "processor": "A chip", "cores": 2, "device": {"none": "why"}}
    return Report(platform, machine, f"{began}T00:00:00Z", "commit 1", {"torch": "9.9"}, facts)


PASSED = Result("device", "passed", figures={"passed": 7})
FAILED = Result("device", "failed", "a | b\nc")
SKIPPED = Result("device", "skipped", "no such card")


def cell(of: Matrix, platform: str, feature: str, *kept: Report, machine: str = "") -> str:
    (row,) = (r for r in of.rows if r.platform == platform and r.machine == machine)
    (wanted,) = (f for f in of.features if f.name == feature)
    return hardware_status.cell(replace(of, notes=()), kept, row, wanted)


def test_the_newest_result_that_ran_is_shown(of: Matrix) -> None:
    old, new = report("cuda"), report("cuda", "2026-02-02")
    assert cell(of, "cuda", "answers") == "not yet"
    old.results["answers"] = PASSED
    assert cell(of, "cuda", "answers", old) == "device"
    new.results["answers"] = SKIPPED
    assert cell(of, "cuda", "answers", old, new) == "device"
    new.results["answers"] = FAILED
    assert cell(of, "cuda", "answers", old, new) == "**device: failed**"
    new.results["answers"] = SKIPPED
    assert cell(of, "cuda", "answers", new) == "not yet"


def test_a_result_counts_where_it_says_something(of: Matrix) -> None:
    on_x86 = report("cpu")
    on_x86.results = {"arm64": replace(PASSED, evidence="emulated"), "kernels": PASSED}
    rows = {"machine": "linux-x86_64"}, {"machine": "linux-arm64"}, {"machine": "darwin-arm64"}
    cells = [cell(of, "cpu", "kernels", on_x86, **row) for row in rows]
    assert cells == ["device", "emulated", "not yet"]
    shared = report("cuda")
    shared.results = {"interpreted_kernels": replace(PASSED, evidence="interpreted")}
    shared.results["traced"] = replace(PASSED, evidence="traced")
    assert cell(of, "xpu", "kernels", shared) == "interpreted"
    assert cell(of, "xpu", "models", shared) == "not yet"


def test_a_section_tells_the_reason_in_one_cell(of: Matrix) -> None:
    one = report("cuda")
    one.results = {"answers": FAILED, "conformance": PASSED}
    text = hardware_status.page(of, [one])
    assert "| **failed** 2026-01-02 | a \\| b c | `ci/run_platform cuda --checks answers` |" in text
    assert "passed 2026-01-02 | passed 7 |" in text
    assert "- 2026-01-02, commit 1: A system, A chip, 2 cores; no device; torch 9.9" in text


def test_reports_are_kept_without_details_until_newer_ones_have_all(
    of: Matrix, tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    for began in ("2026-01-02", "2026-02-02"):
        one = report("cuda", began)
        one.results["answers"] = replace(PASSED, details={"much": "text"})
        one.write(tmp_path / "one.json")
        path = hardware_status.keep(of, tmp_path / "one.json", kept)
        assert read(path).results["answers"].details == {}
    assert [p.name for p in hardware_status.drop_superseded(of, kept)] == [
        "cuda-linux-x86_64-20260102T000000Z.json"
    ]
    assert len(list(kept.iterdir())) == 1


def test_a_report_of_what_the_matrix_does_not_know_is_refused(of: Matrix, tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    report("cpu", machine="plan9-mips").write(path)
    with pytest.raises(MatrixError, match="No row is for cpu on plan9-mips"):
        hardware_status.keep(of, path, tmp_path)
    wrong = report("cuda")
    wrong.results["taste"] = PASSED
    wrong.write(path)
    with pytest.raises(MatrixError, match="There is no check 'taste'; there are selection, "):
        hardware_status.keep(of, path, tmp_path)
