"""What vendors' products on stored integers need of a matrix in common: its zeros, whole; its
bytes with one scale for each output."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...common.checkpoint.quantised_rows import GROUP, QuantisedRows
from ...common.errors import KernelError


def scales_by_group(weight: QuantisedRows, provider: str) -> Tensor:
    """(n, groups) float32. Raises KernelError for scales of half a group."""
    if weight.scale.shape[1] != weight.q.shape[1]:
        raise KernelError(f"{provider!r} has no form for scales per {GROUP // 2} columns.")
    return torch.from_numpy(weight.scale).float()


def whole_zeros(weight: QuantisedRows, scale: Tensor, provider: str) -> Tensor | None:
    """(n, groups) float32: what is taken from numbers, where minimums are zeros times scales, as
    formats store them; None without minimums. Raises KernelError for other minimums."""
    if weight.minimum is None:
        return None
    minimum = torch.from_numpy(weight.minimum).float()
    zeros = (minimum / torch.where(scale == 0, 1.0, scale)).round()
    if bool(((zeros * scale).half() != minimum.half()).any()) or bool((zeros.abs() > 256).any()):
        raise KernelError(f"{provider!r} has no form for minimums that are not zeros times scales.")
    return zeros


def bytes_by_output(weight: Any, provider: str) -> tuple[Tensor, Tensor, NDArray[np.int64] | None]:
    """(n, k) int8, (n,) float32 and the order of columns. Raises KernelError for another form."""
    if not isinstance(weight, QuantisedRows) or weight.bits != 8 or weight.minimum is not None:
        raise KernelError(f"{provider!r} has no form for {type(weight).__name__}.")
    scale = scales_by_group(weight, provider)
    if not bool((scale == scale[:, :1]).all()):
        raise KernelError(f"{provider!r} has one scale for each output, this matrix has groups.")
    numbers = torch.from_numpy(weight.q).flatten(1)[:, : weight.columns].contiguous()
    return numbers, scale[:, 0].contiguous(), weight.order
