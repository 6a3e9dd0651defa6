"""Options shared by all tests; a cache folder of their own, so that no test, and no server that one
starts, writes to the user's."""

from __future__ import annotations

import os
import sys
import tempfile
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
        "--demo",
        action="store_true",
        help="the HTTP suite serves the demo model on emulated and interpreted devices too, "
        "where it is slow, instead of a tiny one",
    )
    parser.addoption(
        "--served",
        action="store_true",
        help="of the HTTP suite only the tests that run on --platform, without those that are "
        "always the toy's or a platform's own",
    )
    parser.addoption(
        "--checkpoint",
        action="append",
        default=[],
        help="another real checkpoint for the greedy-continuation oracle (repeatable)",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Before anything is imported that reads it; processes that tests start inherit it. Models that
    the user has downloaded stay within reach."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    os.environ.setdefault("HF_HOME", str(Path(cache) / "huggingface"))
    folder = tempfile.TemporaryDirectory(prefix="sixfold-tests-")
    config.add_cleanup(folder.cleanup)
    os.environ["XDG_CACHE_HOME"] = folder.name
