"""Everything that a real device can show, in one command and one JSON file.

    ci/run_platform cuda [--out results.json] [--stages conformance,graphs] [--small]

Installs nothing. Each stage runs in a process of its own, so that one that breaks the device leaves
the others; the file is written after each. Exit status: 0 all stages passed, 1 one failed, 3 there
is no such device, with the reason and the remedy printed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("torch", "numpy", "psutil")
LONGEST = 540
"""Seconds that one stage may take."""
NO_DEVICE = 3


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="ci/run_platform", description=__doc__.splitlines()[0])
    parser.add_argument("platform", help="cuda, rocm, npu, xpu or cpu")
    parser.add_argument("--out", type=Path, default=Path("device-results.json"))
    parser.add_argument("--stages", default="", help="only these, separated by commas")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the stages")
    parser.add_argument("--stage", default="", help=argparse.SUPPRESS)  # inside a stage's process
    return parser.parse_args()


def one_stage(asked: argparse.Namespace) -> dict[str, Any]:
    """In the stage's own process."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "sixfold").symlink_to(ROOT)  # the checkout is the package
        sys.path[:0] = [folder, str(ROOT / "tests")]
        from device.card import NoCard, open_card
        from device.stages import FULL, SMALL, STAGES

        try:
            card = open_card(asked.platform, SMALL if asked.small else FULL)
            return STAGES[asked.stage](card)
        except NoCard as reason:
            return {"ok": False, "no device": str(reason)}
        except Exception as error:  # whatever it is, it is the stage's result
            trace = traceback.format_exc().splitlines()[-12:]
            return {"ok": False, "error": f"{type(error).__name__}: {error}"[:2000], "trace": trace}


def run_stage(asked: argparse.Namespace, stage: str) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".json") as answer:
        command = [sys.executable, __file__, asked.platform, "--stage", stage, "--out", answer.name]
        command += ["--small"] if asked.small else []
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=LONGEST
            )
        except subprocess.TimeoutExpired:
            return {"ok": False, "error": f"took longer than {LONGEST} s"}
        text = Path(answer.name).read_text()
    if text:
        return dict(json.loads(text))
    return {"ok": False, "error": f"ended with status {done.returncode}: {done.stderr[-1500:]}"}


def stage_names(asked: argparse.Namespace) -> list[str]:
    known = ["environment", "conformance", "agreement", "graphs", "operations", "model"]
    chosen = [name for name in asked.stages.split(",") if name] or known
    unknown = sorted(set(chosen) - set(known))
    if unknown:
        raise SystemExit(f"There is no stage {', '.join(unknown)}; there are {', '.join(known)}.")
    return chosen


def main() -> int:
    asked = arguments()
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        print(f"SKIPPED: {', '.join(missing)} not installed for {sys.executable}")
        return NO_DEVICE
    if asked.stage:
        asked.out.write_text(json.dumps(one_stage(asked), default=float))
        return 0
    results: dict[str, Any] = {"platform": asked.platform, "small": asked.small, "stages": {}}
    for stage in stage_names(asked):
        began = time.perf_counter()
        result = run_stage(asked, stage)
        result["seconds of the stage"] = round(time.perf_counter() - began, 1)
        results["stages"][stage] = result
        asked.out.write_text(json.dumps(results, indent=1))
        if "no device" in result:
            print(f"SKIPPED, nothing ran: {result['no device']}")
            return NO_DEVICE
        verdict = "ok" if result["ok"] else f"FAILED {result.get('error', '')}"
        print(f"{stage:12s} {result['seconds of the stage']:6.1f} s  {verdict}", flush=True)
    print(f"written to {asked.out}")
    return 0 if all(result["ok"] for result in results["stages"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
