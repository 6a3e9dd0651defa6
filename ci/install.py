"""Install Sixfold in the running environment, with the extra that this machine's hardware needs.

    python ci/install.py [demo] [test] [dev]

First the core (no tensor framework), then a look at the machine with the platforms' own probes,
then the extra of the platform that could serve here. `--platform NAME` skips the look.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("demo", "test", "dev")
LOOK = """
from sixfold.platforms.machine import observe
from sixfold.platforms.select import install_extra
print(*install_extra(observe()), sep="\\t")
"""


def pip_install(extras: list[str]) -> None:
    target = str(ROOT) + (f"[{','.join(extras)}]" if extras else "")
    constraints = ["--constraint", str(ROOT / "ci" / "constraints.txt")]
    quiet = ["--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *quiet, *constraints, "--editable", target]
    if subprocess.run(command, check=False).returncode:
        sys.exit(f"sixfold: could not install {target}; pip's message is above.")


def wanted_extra() -> tuple[str, str]:
    """(extra, why), asked of the freshly installed package in a process of its own."""
    look = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, check=False)
    if look.returncode:
        sys.exit(f"sixfold: the look at this machine failed:\n{look.stderr}")
    extra, why = look.stdout.strip().split("\t")
    return extra, why


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("extras", nargs="*", choices=EXTRAS)
    parser.add_argument("--platform", help="install this platform's extra instead of looking")
    asked = parser.parse_args()
    print("sixfold: installing the core ...", flush=True)
    pip_install([])
    extra, why = (asked.platform, "asked for") if asked.platform else wanted_extra()
    print(f"sixfold: installing [{extra}] ({why}) ...", flush=True)
    pip_install([extra, *asked.extras])


if __name__ == "__main__":
    main()
