"""A kernel table in plain torch, as short as the ops' contracts allow: the models' test double.

Independent of `platforms/torch_runtime`, so that models are tested without it.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's customary name
from torch import Tensor

from sixfold.platforms.interface_kernels import Kernel, KernelTable


def embedding(ids: Tensor, table: Tensor, scale: float = 1.0) -> Tensor:
    return table[ids.long()] * scale


def rope_angles(positions: Tensor, inverse: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    angles = torch.outer(positions.float(), inverse)
    return angles.cos() * scale, angles.sin() * scale


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (normed * weight.float()).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm(total, weight, eps), total


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1).to(x.dtype)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _turn(q, cos, sin), _turn(k, cos, sin)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor]:
    return rope(rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps), cos, sin)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def gelu_tanh_mul(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


def moe(
    x: Tensor,
    router_logits: Tensor,
    gate_up: Tensor,
    down: Tensor,
    top_k: int,
    renormalise: bool,
) -> Tensor:
    weights = router_logits.float().softmax(-1)
    best = torch.sort(router_logits.float(), dim=-1, descending=True, stable=True)[1][:, :top_k]
    scale = weights.gather(-1, best)
    if renormalise:
        scale = scale / scale.sum(-1, keepdim=True)
    out = torch.zeros_like(x)
    for row in range(len(x)):
        for expert, factor in zip(best[row].tolist(), scale[row], strict=True):
            gate, up = (gate_up[expert] @ x[row]).chunk(2)
            out[row] += factor.to(x.dtype) * (down[expert] @ silu_mul(gate, up))
    return out


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    wide = x.float()
    apart = wide - wide.mean(-1, keepdim=True)
    normed = apart * torch.rsqrt(apart.pow(2).mean(-1, keepdim=True) + eps) * weight.float()
    return (normed if bias is None else normed + bias.float()).to(x.dtype)


def segment_attention(
    q: Tensor, k: Tensor, v: Tensor, starts: tuple[int, ...], scale: float
) -> Tensor:
    parts = []
    for begin, end in pairwise(starts):
        queries, keys, values = (x[begin:end].float() for x in (q, k, v))
        weights = (torch.einsum("qhd,khd->hqk", queries, keys) * scale).softmax(-1)
        parts.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(parts).to(q.dtype)


def reference_table() -> KernelTable:
    """Every op that models call."""
    ops: list[Any] = [
        embedding,
        linear,
        rms_norm,
        add_rms_norm,
        rope_angles,
        rope,
        qk_norm_rope,
        silu_mul,
        gelu_tanh_mul,
        moe,
        layer_norm,
        segment_attention,
    ]
    kernels = {
        fn.__name__: Kernel(fn.__name__, "test", lambda facts, problem: None, fn) for fn in ops
    }
    return KernelTable(kernels, ())
