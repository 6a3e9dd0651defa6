"""`sixfold check --platform npu` on a machine without one: the command itself, over the emulator of
torch_npu (tests/support/emulated_npu). Its results are called *emulated*.

    python ci/emulated_check.py --platform npu [--op OP] [--json]

Of xpu the same is `sixfold check --platform xpu --interpret`.
"""

from __future__ import annotations

import sys

from matrix import ROOT  # makes this checkout `sixfold`

sys.path.insert(0, str(ROOT / "tests"))

from support.emulated_npu.platform import PLATFORM

from sixfold.platforms import select
from sixfold.server.cli import main


def installed() -> None:
    """The emulated platform in the place of the real one, under its name."""
    in_tree = select.platforms
    PLATFORM.name = "npu"
    select.platforms = lambda: {**in_tree(), PLATFORM.name: PLATFORM}


if __name__ == "__main__":
    installed()
    sys.argv.insert(1, "check")
    main()
