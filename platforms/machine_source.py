"""Where facts about a machine come from: files, vendor tools, the environment, nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

TOOL_TIMEOUT_S = 5.0


def run_tool(command: Sequence[str]) -> str:
    """What a tool on PATH prints; "" when it is absent, fails or hangs."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
    except OSError:
        return ""
    try:
        output, _ = process.communicate(timeout=TOOL_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()  # no wait: a tool stuck in its driver cannot be reaped
        return ""
    return output.decode(errors="replace") if process.returncode == 0 else ""


@dataclass(frozen=True, slots=True)
class Source:
    """The running machine; tests put a folder, canned answers and variables in its place."""

    root: Path = Path("/")
    run: Callable[[Sequence[str]], str] = run_tool
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)

    def path(self, name: str) -> Path:
        return self.root / name.lstrip("/")

    def text(self, name: str | Path) -> str:
        """The stripped contents of a file; "" when it cannot be read."""
        try:
            return self.path(str(name)).read_text(errors="replace").strip("\0 \n\t")
        except OSError:
            return ""

    def number(self, name: str | Path) -> int:
        """The integer in a file (0x… is hexadecimal); 0 when there is none."""
        try:
            return int(self.text(name), 0)
        except ValueError:
            return 0

    def glob(self, pattern: str) -> list[str]:
        """Absolute names as the machine itself would spell them, in order."""
        try:
            found = sorted(self.root.glob(pattern.lstrip("/")))
        except OSError:
            return []
        return ["/" + str(path.relative_to(self.root)) for path in found]

    def link(self, name: str) -> str:
        """The last part of what a symbolic link points to; "" when it is none."""
        path = self.path(name)
        return os.path.basename(os.readlink(path)) if path.is_symlink() else ""

    def allowed(self, name: str) -> bool:
        return os.access(self.path(name), os.R_OK | os.W_OK)
