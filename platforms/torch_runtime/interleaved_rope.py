"""Generic kernels of the rotation of neighbouring pairs, and of the ops around it."""

from __future__ import annotations

import torch
from torch import Tensor


def interleaved_rope(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    turned = turn_pairs(x.float(), cos.unsqueeze(1), sin.unsqueeze(1), inverse)
    return turned.to(x.dtype)


def turn_pairs(wide: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """wide (..., D) float32, angles (..., R/2) that broadcast against its pairs."""
    rest = wide.shape[-1] - 2 * cos.shape[-1]
    even, odd = wide[..., rest::2], wide[..., rest + 1 :: 2]
    sin = -sin if inverse else sin
    pairs = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return torch.cat((wide[..., :rest], pairs.flatten(-2)), dim=-1)


def shared_kv_norm_rope(
    q: Tensor, kv: Tensor, kv_weight: Tensor, eps: float, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    key = turn_pairs(unit(kv.float(), eps) * kv_weight, cos, sin)
    query = turn_pairs(unit(q.float(), eps), cos.unsqueeze(1), sin.unsqueeze(1))
    return query.to(q.dtype), key.to(kv.dtype)


def unit(wide: Tensor, eps: float) -> Tensor:
    """float32 divided by its root mean square over the last axis."""
    return wide * (wide.square().mean(dim=-1, keepdim=True) + eps).rsqrt()


def grouped_linear(x: Tensor, weight: Tensor) -> Tensor:
    groups, _, inputs = weight.shape
    parts = x.reshape(len(x), groups, inputs).transpose(0, 1)
    return torch.bmm(parts, weight.mT).transpose(0, 1).flatten(1)


def inverse_rope_grouped_linear(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor) -> Tensor:
    return grouped_linear(interleaved_rope(x, cos, sin, inverse=True).flatten(1), weight)
