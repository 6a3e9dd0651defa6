"""How the emulated device refuses, and the checks that its ops share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
HALVES = (torch.float16, torch.bfloat16)


class NPUError(RuntimeError):
    """What torch_npu raises for arguments that the op does not take is a RuntimeError."""


def need(true: bool, op: str, what: str) -> None:
    if not true:
        raise NPUError(f"{op}: {what}")


def dtype_of(op: str, name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    need(tensor.dtype in allowed, op, f"{name} is {tensor.dtype}, not one of {allowed}")


def contiguous(op: str, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None:
            need(tensor.is_contiguous(), op, f"{name} is not contiguous")


def not_emulated(op: str, **given: Any) -> None:
    """Optional arguments whose meaning the emulator does not have."""
    for name, value in given.items():
        need(value is None or value is False or value == 0, op, f"{name} is not emulated")
