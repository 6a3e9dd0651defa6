"""Two torch threads at most, and the kernel tables that models are tested on."""

from __future__ import annotations

import pytest
import torch
from reference_kernels import reference_table

from sixfold.platforms.interface_kernels import Kernel, KernelTable
from sixfold.platforms.torch_runtime.kernels import GENERIC

torch.set_num_threads(2)


def generic_table() -> KernelTable:
    """The kernels that every torch platform falls back to."""
    kernels = {op: Kernel(op, "generic", lambda f, p: None, fn) for op, fn in GENERIC.items()}
    return KernelTable(kernels, ())


@pytest.fixture(params=["reference", "generic"])
def table(request: pytest.FixtureRequest) -> KernelTable:
    return reference_table() if request.param == "reference" else generic_table()
