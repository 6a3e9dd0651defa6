"""Options shared by all tests, and one torch thread per test process where torch is used."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

# `tests/support` holds shared fakes; tests import them as `support.…`.
sys.path.insert(0, str(Path(__file__).parent))

# MLX has no wheel for some machines (an Intel Mac, Windows).
collect_ignore_glob = [] if find_spec("mlx") else ["*/test_mlx_*.py"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--platform", default="toy", help="platform that the HTTP suite runs on (default: toy)"
    )
    parser.addoption(
        "--checkpoint",
        action="append",
        default=[],
        help="another real checkpoint for the greedy-continuation oracle (repeatable)",
    )
