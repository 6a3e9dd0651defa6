"""Options shared by all tests, and one torch thread per test process where torch is used."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# `tests/support` holds shared fakes; tests import them as `support.…`.
sys.path.insert(0, str(Path(__file__).parent))


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
