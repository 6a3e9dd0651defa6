"""Rotary embedding by `npu_rotary_mul`. Page: op-plugin, `torch_npu-npu_rotary_mul.md`: input
(B, S, N, D) with angles (1, S, 1, D) of its dtype within [-1, 1]. Not yet run on a device.

The contract's angles are float32 and stay so: the rotation is of float32 and rounded once. Scaled
ones (YaRN) leave [-1, 1]; so all go in as a sixteenth, and results come out sixteen times smaller,
which loses nothing: both are powers of two.
"""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from ..interface import DeviceFacts
from ..interface_kernels import Kernel, Problem
from ..torch_runtime.kernels import rms_norm, turn_together
from .library import PACKAGE, PRIORITY, refusal

WIDEST, MOST_HEADS = 895, 999
SPARE = 16.0
"""Largest angle that is served; YaRN's scale is 0.1 ln(factor) + 1."""


def _turned(x: Tensor, cos: Tensor, sin: Tensor, mode: str) -> Tensor:
    """x (T, N, R), cos and sin (T, R) float32 -> x turned, of its dtype."""
    angles = [(part / SPARE)[None, :, None].contiguous() for part in (cos, sin)]
    wide = x.float().unsqueeze(0).contiguous()
    result: Tensor = import_module(PACKAGE).npu_rotary_mul(wide, *angles, mode)
    return result.squeeze(0).mul_(SPARE).to(x.dtype)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Of no rows the page says nothing, so they do not reach the library."""
    if not len(q):
        return torch.empty_like(q), torch.empty_like(k)
    cosines, sines = (torch.cat((part, part), dim=-1) for part in (cos, sin))
    return turn_together(q, k, 2 * cos.shape[-1], lambda x: _turned(x, cosines, sines, "half"))


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor]:
    """The norms are torch's: their weights may be float32 beside 16 bits, as the library's not."""
    return rope(rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps), cos, sin)


def interleaved_rope(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    if not x.numel():
        return torch.empty_like(x)
    rest = x.shape[-1] - 2 * cos.shape[-1]
    parts = cos, -sin if inverse else sin
    cosines, sines = (part.repeat_interleave(2, dim=-1) for part in parts)
    turned = _turned(x[..., rest:], cosines, sines, "interleave")
    return torch.cat((x[..., :rest], turned), dim=-1)


def _requires(facts: DeviceFacts, problem: Problem) -> str | None:
    reason = refusal(facts)
    if reason is not None:
        return reason
    if problem.dtype not in facts.dtypes:
        return f"{facts.name} has no {problem.dtype}"
    heads = problem.dims.get("heads", 1) + problem.dims.get("kv_heads", 0)
    if heads > MOST_HEADS:
        return f"turns up to {MOST_HEADS} heads, not {heads}"
    width = problem.dims.get("head_dim", 1)
    if width > WIDEST:
        return f"turns up to {WIDEST} numbers of a head, not {width}"
    return None


KERNELS = (
    Kernel("rope", PACKAGE, _requires, rope, PRIORITY),
    Kernel("qk_norm_rope", PACKAGE, _requires, qk_norm_rope, PRIORITY),
    Kernel("interleaved_rope", PACKAGE, _requires, interleaved_rope, PRIORITY),
)
