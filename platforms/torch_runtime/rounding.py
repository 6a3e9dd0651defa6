"""Matrices rounded on load (`--quantize int8`, `int4`): the same numbers on every platform that
keeps scales in float16."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own spelling)
from torch import Tensor

GROUP = 32
"""Inputs that share a scale."""


def round_int8(weight: Tensor, dtype: torch.dtype = torch.float16) -> tuple[Tensor, Tensor]:
    """weight (n, k) -> q (n, groups, 32) whole numbers -127..127, scale (n, groups) in `dtype`.
    Symmetric: the largest magnitude of an output's 32 inputs becomes 127."""
    groups = in_groups(weight.float())
    scale = (groups.abs().amax(-1, keepdim=True) / 127).to(dtype)
    return _divide(groups, scale).clamp_(-127, 127), scale.squeeze(-1)


def round_int4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """weight (n, k) -> q (n, groups, 32) whole numbers 0..15, scale and minimum (n, groups)
    float16. Sixteen levels from a minimum, the range chosen among several shrunken ones by the
    least squared error of the group (calibration-free clipping search)."""
    groups = in_groups(weight.float())
    low, high = (
        groups.amin(-1, keepdim=True).clamp(max=0),
        groups.amax(-1, keepdim=True).clamp(min=0),
    )
    best: list[Tensor] = []
    for shrink in (1.0, 0.95, 0.9, 0.85, 0.8, 0.75):
        scale = ((high - low) * (shrink / 15)).half()
        minimum = (-low * shrink).half()
        q = _divide(groups + minimum.float(), scale).clamp_(0, 15)
        error = (q * scale.float() - minimum.float() - groups).square_().sum(-1, keepdim=True)
        found = [error, q, scale, minimum]
        if best:
            better = error < best[0]
            found = [torch.where(better, new, old) for new, old in zip(found, best, strict=True)]
        best = found
    _, q, scale, minimum = best
    return q, scale.squeeze(-1), minimum.squeeze(-1)


def in_groups(weight: Tensor) -> Tensor:
    """(n, k) -> (n, groups, 32), zeros in the padding."""
    n, k = weight.shape
    return F.pad(weight, (0, -k % GROUP)).view(n, -1, GROUP)


def _divide(values: Tensor, scale: Tensor) -> Tensor:
    wide = scale.float()
    return (values / torch.where(wide > 0, wide, 1.0)).round_()
