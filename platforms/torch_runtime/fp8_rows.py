"""Generic kernels of activations rounded to eight-bit floats with a scale per block."""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.ops.fp8_rows import LEAST_MAGNITUDE, MOST
from .interleaved_rope import turn_pairs, unit

DTYPES = {"ocp": torch.float8_e4m3fn, "fnuz": torch.float8_e4m3fnuz}


def block_quant(x: Tensor, block: int, power: bool, form: str) -> tuple[Tensor, Tensor]:
    most = MOST[form]
    parts = x.float().unflatten(-1, (x.shape[-1] // block, block))
    scale = parts.abs().amax(dim=-1).clamp(min=LEAST_MAGNITUDE) / most
    if power:
        mantissa, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
    values = (parts / scale.unsqueeze(-1)).clamp(-most, most)
    codes = values.flatten(-2).to(DTYPES[form])
    # What rounds to zero is plus zero: -0 and NaN are one code in the format without it.
    unsigned = torch.where(codes.float() == 0, 0.0, codes.float())
    return unsigned.to(DTYPES[form]), scale


def inverse_rope_quant(
    x: Tensor, cos: Tensor, sin: Tensor, block: int, power: bool, form: str
) -> tuple[Tensor, Tensor]:
    turned = turn_pairs(x.float(), cos.unsqueeze(1), sin.unsqueeze(1), inverse=True)
    return block_quant(turned.flatten(1), block, power, form)


def qk_norm_rope_quant(
    q: Tensor,
    kv: Tensor,
    kv_weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    block: int,
    power: bool,
    form: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query = turn_pairs(unit(q.float(), eps), cos.unsqueeze(1), sin.unsqueeze(1))
    key = turn_pairs(unit(kv.float(), eps) * kv_weight, cos, sin)
    rest = key.shape[1] - 2 * cos.shape[1]
    codes, scale = block_quant(key[:, :rest], block, power, form)
    return query.to(q.dtype), codes, scale, key[:, rest:].to(kv.dtype)
