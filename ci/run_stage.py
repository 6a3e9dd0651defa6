"""One stage of tests/device/stages.py, in a process of its own: `ci/run_platform` starts it.

python ci/run_stage.py PLATFORM STAGE ANSWER.json [--small]
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from pathlib import Path
from typing import Any

from matrix import ROOT  # makes this checkout `sixfold`


def one_stage(asked: argparse.Namespace) -> dict[str, Any]:
    sys.path.insert(0, str(ROOT / "tests"))
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("platform")
    parser.add_argument("stage")
    parser.add_argument("answer", type=Path)
    parser.add_argument("--small", action="store_true")
    asked = parser.parse_args()
    asked.answer.write_text(json.dumps(one_stage(asked), default=float))


if __name__ == "__main__":
    main()
