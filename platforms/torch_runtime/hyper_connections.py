"""Generic kernels of hyper-connections. Streams are widened to float32 for every sum."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own spelling)
from torch import Tensor


def mhc_pre(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    iterations: int,
    eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    count = streams.shape[1]
    wide = streams.float()
    made = _products(wide, fn, norm_eps)
    sizes = (count, count, count * count)
    pre, post, mixing = (
        part * factor + shift
        for part, factor, shift in zip(
            made.split(sizes, dim=-1), scale.unbind(), base.split(sizes), strict=True
        )
    )
    mixing = mixing.unflatten(-1, (count, count)).softmax(dim=-1) + eps
    mixing.div_(mixing.sum(dim=-2, keepdim=True).add_(eps))
    for _ in range(iterations - 1):
        mixing.div_(mixing.sum(dim=-1, keepdim=True).add_(eps))
        mixing.div_(mixing.sum(dim=-2, keepdim=True).add_(eps))
    return _weighted(wide, pre.sigmoid() + eps, streams.dtype), 2.0 * post.sigmoid(), mixing


def mhc_post(made: Tensor, streams: Tensor, post: Tensor, mixing: Tensor) -> Tensor:
    mixed = torch.matmul(mixing.mT, streams.float())
    return (mixed + post.unsqueeze(-1) * made.float().unsqueeze(1)).to(streams.dtype)


def mhc_post_pre(
    made: Tensor,
    streams: Tensor,
    post: Tensor,
    mixing: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm_weight: Tensor,
    iterations: int,
    eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    streams = mhc_post(made, streams, post, mixing)
    entered, post, mixing = mhc_pre(streams, fn, base, scale, iterations, eps, norm_eps)
    wide = entered.float()
    root = (wide.square().mean(dim=-1, keepdim=True) + norm_eps).rsqrt()
    return streams, (wide * root * norm_weight).to(entered.dtype), post, mixing


def mhc_head(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float, norm_eps: float
) -> Tensor:
    wide = streams.float()
    weights = (_products(wide, fn, norm_eps) * scale + base).sigmoid() + eps
    return _weighted(wide, weights, streams.dtype)


def _products(wide: Tensor, fn: Tensor, norm_eps: float) -> Tensor:
    """Of all streams of a token side by side, divided by their root mean square. (T, outputs)."""
    flat = wide.reshape(len(wide), fn.shape[1])
    return F.linear(flat, fn) * (flat.square().mean(dim=-1, keepdim=True) + norm_eps).rsqrt()


def _weighted(wide: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.matmul(weights.unsqueeze(1), wide).squeeze(1).to(dtype)
