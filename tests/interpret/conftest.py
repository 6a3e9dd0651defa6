"""Tests of the Triton kernels in Triton's interpreter, on CPU tensors: `make interpret`.

Triton reads TRITON_INTERPRET when it is imported, and kernels of an interpreting process cannot be
compiled: so these tests have a process of their own, and no other run collects them.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

from sixfold.platforms.torch_runtime.interpreted import start_interpreter

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None

if INTERPRETED:
    start_interpreter()

collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-cases",
        action="store_true",
        help="every case of the ops whose interpreted cases are few for the sake of time",
    )
