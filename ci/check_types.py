"""Run mypy over the package by its name, whatever the checkout's folder is called.

The repository root is the package, so mypy needs a folder that holds a link `sixfold` to it.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("sixfold.common", "sixfold.server", "sixfold.platforms", "sixfold.models")


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "sixfold").symlink_to(ROOT)
        names = [word for package in PACKAGES for word in ("-p", package)]
        config = ["--config-file", str(ROOT / "pyproject.toml")]
        command = [sys.executable, "-m", "mypy", *config, *names]
        return subprocess.run(command, cwd=folder, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
