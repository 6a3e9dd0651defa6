"""Generic kernels of gated activations."""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812 (torch's own spelling)
from torch import Tensor


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate).mul_(up)


def gelu_tanh_mul(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh").mul_(up)


def sigmoid_mul(gate: Tensor, x: Tensor) -> Tensor:
    return (gate.float().sigmoid() * x).to(x.dtype)


def clamped_swiglu(
    gate: Tensor,
    up: Tensor,
    limit: float,
    slope: float,
    offset: float,
    clamp_after: bool = False,
) -> Tensor:
    g = gate.float() if clamp_after else gate.float().clamp(max=limit)
    u = up.float().clamp(-limit, limit)
    opened = g * (slope * g).sigmoid()
    opened = opened.clamp(max=limit) if clamp_after else opened
    return ((u + offset) * opened).to(gate.dtype)
