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


def clamped_swiglu(gate: Tensor, up: Tensor, limit: float, slope: float, offset: float) -> Tensor:
    g = gate.float().clamp(max=limit)
    u = up.float().clamp(-limit, limit)
    return ((u + offset) * g * (slope * g).sigmoid()).to(gate.dtype)
