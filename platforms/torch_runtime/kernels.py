"""Generic kernels: every op in plain torch. They run on any torch device and are the fallback of
every torch platform. Statistics and rotations are computed in float32 whatever the dtype."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own spelling)
from torch import Tensor

from ...common.ops.page_digest import SEED, STRIDE
from ..interface import DeviceFacts
from ..interface_kernels import Kernel, Problem
from .activations import clamped_swiglu, gelu_tanh_mul, sigmoid_mul, silu_mul
from .attention import SdpaAttention
from .compress import compress_norm_rope_store
from .compressed_attention import compressed_attention, index_topk
from .device import TorchDevice
from .experts import moe, moe_experts, moe_route
from .fp8_rows import block_quant, inverse_rope_quant, qk_norm_rope_quant
from .hyper_connections import mhc_head, mhc_post, mhc_post_pre, mhc_pre
from .interleaved_rope import (
    grouped_linear,
    interleaved_rope,
    inverse_rope_grouped_linear,
    shared_kv_norm_rope,
)
from .latent_attention import latent_attention, merge_state
from .recurrent import conv1d_update, gated_delta
from .sampler import draw, mix32, sample, signed
from .segment_attention import segment_attention
from .widened_linear import widened_linear

if TYPE_CHECKING:
    from ...common.ops.registry import KernelRegistry


def embedding(ids: Tensor, table: Tensor, scale: float = 1.0) -> Tensor:
    rows = F.embedding(ids, table)
    return rows if scale == 1.0 else rows * scale


def rope_angles(positions: Tensor, inverse: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    angles = positions[:, None].float() * inverse
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if scale == 1.0 else (cos * scale, sin * scale)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
    scale = scale.mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
    return (wide * scale).mul_(weight).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm(total, weight, eps), total


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    shift = None if bias is None else bias.float()
    return F.layer_norm(x.float(), weight.shape, weight.float(), shift, eps).to(x.dtype)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """x * (cos, cos) + (x's halves swapped) * (-sin, sin)."""
    rotary = 2 * cos.shape[-1]
    cosines = torch.cat((cos, cos), dim=-1).unsqueeze(1)
    sines = torch.cat((-sin, sin), dim=-1).unsqueeze(1)

    def turn(x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * cosines).addcmul_(wide.roll(rotary // 2, dims=-1), sines).to(x.dtype)

    return turn_together(q, k, rotary, turn)


def turn_together(
    q: Tensor, k: Tensor, rotary: int, turn: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """`turn` of the first `rotary` numbers of each head, of queries and keys at once."""
    heads = q.shape[1]
    both = torch.cat((q, k), dim=1)
    turned = turn(both[..., :rotary])
    if rotary < q.shape[-1]:
        turned = torch.cat((turned, both[..., rotary:]), dim=-1)
    return turned[:, :heads], turned[:, heads:]


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


def kv_write(
    keys: Tensor, values: Tensor, slots: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    return keys.index_copy_(0, slots, k), values.index_copy_(0, slots, v)


def page_copy(pool: Tensor, sources: Tensor, targets: Tensor) -> Tensor:
    return pool.index_copy_(1, targets, pool.index_select(1, sources))


def page_gather(
    keys: Tensor, values: Tensor, pages: Tensor, heads: int, page_size: int
) -> tuple[Tensor, Tensor]:
    rows, columns = pages.shape

    def gathered(storage: Tensor) -> Tensor:
        blocks = storage.view(heads, -1, page_size * storage.shape[1])
        found = blocks.index_select(1, pages.reshape(-1)).unflatten(1, (rows, columns))
        return found.transpose(0, 1).reshape(rows, heads, columns * page_size, storage.shape[1])

    return gathered(keys), gathered(values)


def page_digest(pool: Tensor, pages: Tensor) -> Tensor:
    """int64, for torch has little of uint32."""
    found = pool.index_select(0, pages).flatten(1)
    width = 8 * found.element_size()
    bits = found.view(_BITS[width]).int() & (-1 if width == 32 else (1 << width) - 1)
    places = torch.arange(bits.shape[1], dtype=torch.int32, device=pool.device)
    k = mix32(places * signed(STRIDE) + SEED)
    a = mix32(k ^ bits)
    words = [part.sum(dim=1, dtype=torch.int64) & 0xFFFFFFFF for part in (a, mix32(a + k))]
    return torch.stack(words, dim=1)


_BITS = {8: torch.int8, 16: torch.int16, 32: torch.int32}


def logprobs(logits: Tensor, token_ids: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    clean = torch.nan_to_num(logits, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    # Shifted first: subtracting the logarithm from large logits would cancel their digits.
    best = clean.amax(dim=-1, keepdim=True)
    shifted = clean - torch.where(torch.isfinite(best), best, 0.0)
    total = torch.logsumexp(shifted, dim=-1, keepdim=True)
    total = torch.where(torch.isfinite(total), total, 0.0)
    chosen = shifted.gather(1, token_ids.unsqueeze(1)) - total
    values, ids = torch.topk(shifted, min(top, logits.shape[-1]), dim=-1)
    return chosen.squeeze(1), ids, values - total


GENERIC: dict[str, Callable[..., Any]] = {
    "embedding": embedding,
    "linear": linear,
    "rms_norm": rms_norm,
    "add_rms_norm": add_rms_norm,
    "layer_norm": layer_norm,
    "rope_angles": rope_angles,
    "rope": rope,
    "qk_norm_rope": qk_norm_rope,
    "silu_mul": silu_mul,
    "gelu_tanh_mul": gelu_tanh_mul,
    "sigmoid_mul": sigmoid_mul,
    "clamped_swiglu": clamped_swiglu,
    "moe_route": moe_route,
    "moe_experts": moe_experts,
    "moe": moe,
    "conv1d_update": conv1d_update,
    "gated_delta": gated_delta,
    "latent_attention": latent_attention,
    "mhc_pre": mhc_pre,
    "mhc_post": mhc_post,
    "mhc_post_pre": mhc_post_pre,
    "mhc_head": mhc_head,
    "interleaved_rope": interleaved_rope,
    "shared_kv_norm_rope": shared_kv_norm_rope,
    "grouped_linear": grouped_linear,
    "inverse_rope_grouped_linear": inverse_rope_grouped_linear,
    "block_quant": block_quant,
    "inverse_rope_quant": inverse_rope_quant,
    "qk_norm_rope_quant": qk_norm_rope_quant,
    "compress_norm_rope_store": compress_norm_rope_store,
    "index_topk": index_topk,
    "compressed_attention": compressed_attention,
    "merge_state": merge_state,
    "segment_attention": segment_attention,
    "kv_write": kv_write,
    "page_copy": page_copy,
    "page_gather": page_gather,
    "page_digest": page_digest,
    "sample": sample,
    "draw": draw,
    "logprobs": logprobs,
}


READS_ON_HOST = frozenset({"moe", "moe_experts"})
"""Also where every row has one new token, as in captured steps. Other kernels here read lengths on
the host for longer rows only."""


SUMS = ("sample", "draw")
"""Ops with sums over the vocabulary, in the dtype that the device has for them."""


def _anywhere(facts: DeviceFacts, problem: Problem) -> str | None:
    return f"has no {problem.weights} weights" if problem.weights else None


def register_generic(registry: KernelRegistry, device: TorchDevice) -> None:
    """Add the generic kernels and the generic attention backend, at priority 0."""
    for op, fn in GENERIC.items():
        fn = partial(fn, wide=device.sums) if op in SUMS else fn
        registry.add(Kernel(op, "generic", _anywhere, fn, graph_safe=op not in READS_ON_HOST))
    registry.add(widened_linear(device))
    registry.add_attention(SdpaAttention(device))
