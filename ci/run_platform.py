"""What this machine can show of a platform, in one command and one JSON file.

    ci/run_platform cuda [--evidence device,compiled] [--checks conformance,graphs] [--out FILE]

Runs the platform's checks of ci/matrix.toml, each in a process of its own; installs nothing; writes
the file after each. With the device: the checks on it. Without: those that need none, but for what
another platform's run shows for all (`--list` says which). `--evidence` and `--checks` choose
instead. Exit status: 0 what ran passed, 1 a check failed, 2 there is no such check, 3 nothing ran,
with the reasons printed.
"""

from __future__ import annotations

import argparse
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

NEEDED = ("numpy", "psutil", "httpx", "click", "rich")
NOTHING_RAN = 3


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="ci/run_platform", description=__doc__.splitlines()[0])
    parser.add_argument("platform", help="cuda, rocm, npu, xpu, cpu or mlx")
    parser.add_argument("--out", type=Path, help="default: sixfold-PLATFORM.json")
    parser.add_argument("--evidence", default="", help="only these kinds, separated by commas")
    parser.add_argument("--checks", default="", help="only these, separated by commas")
    parser.add_argument("--small", action="store_true", help="stages at tiny sizes, to try them")
    parser.add_argument("--list", action="store_true", help="say what would run, and end")
    return parser.parse_args()


def end_with_the_check() -> None:
    """A SIGTERM raises, as ctrl-c does: what is running then ends its process on the way out."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def main() -> int:
    end_with_the_check()
    asked = arguments()
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        print(f"SKIPPED, nothing ran: {', '.join(missing)} not installed for {sys.executable}")
        return NOTHING_RAN
    from matrix import MatrixError
    from run_column import run

    try:
        report = run(asked)
    except MatrixError as error:
        print(f"ci/run_platform: {error}", file=sys.stderr)
        return 2
    if report is None:
        return 0
    if not report.ran:
        print("SKIPPED, nothing ran: no check of the platform can run here")
        return NOTHING_RAN
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
