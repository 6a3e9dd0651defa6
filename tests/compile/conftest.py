"""Tests of offline compilation: `make compiled`. They change Triton's driver, and an interpreting
process cannot compile, so they have a process of their own; no other run collects them.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

ASKED = [word for word in sys.argv[1:] if Path(word.split("::")[0]).exists()]
ALONE = bool(ASKED) and all("tests/compile" in word for word in ASKED)
COMPILES = os.environ.get("TRITON_INTERPRET") != "1" and find_spec("triton") is not None

collect_ignore_glob = [] if ALONE and COMPILES else ["test_*.py"]

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "ci"))
