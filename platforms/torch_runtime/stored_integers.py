"""What vendors' products on stored integers need of a matrix in common: its zeros, whole."""

from __future__ import annotations

import torch
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
