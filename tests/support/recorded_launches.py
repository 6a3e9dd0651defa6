"""Triton's kernels replaced by what notes their launches and runs nothing: the wrappers are the
real ones, so what they read on the host shows, and so does a launch that follows from values."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from support.triton_checks import PACKAGE

Launch = tuple[str, tuple[int, ...], list[Any], dict[str, Any]]
"""Kernel, grid, arguments with shapes in place of tensors, and what it is specialised on."""


class Recorder:
    """Stands in for a kernel. Its launch raises RuntimeError for tensors of two devices."""

    def __init__(self, name: str, log: list[Launch]) -> None:
        self.name, self.log = name, log

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **named: Any) -> None:
            devices = {str(a.device) for a in args if isinstance(a, torch.Tensor)}
            if len(devices) > 1:
                found = " and ".join(sorted(devices))
                raise RuntimeError(f"{self.name} gets tensors on {found}")
            seen = [tuple(a.shape) if isinstance(a, torch.Tensor) else a for a in args]
            self.log.append((self.name, grid, seen, named))

        return launch


def record_launches(patch: pytest.MonkeyPatch) -> list[Launch]:
    """Of all modules of the package, until `patch` is undone."""
    log: list[Launch] = []
    folder = Path(import_module(PACKAGE).__file__ or "").parent
    for module in [import_module(f"{PACKAGE}.{path.stem}") for path in folder.glob("*.py")]:
        kernels = [name for name, value in vars(module).items() if hasattr(value, "arg_names")]
        for name in [name for name in kernels if name.endswith("_kernel")]:
            patch.setattr(module, name, Recorder(name, log))
    return log
