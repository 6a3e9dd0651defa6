"""Turning and rounding to eight-bit floats, one launch each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...common.ops.fp8_rows import BIAS, LEAST_MAGNITUDE, MOST
from .fp8_rows_kernels import inverse_rope_quant_kernel, qk_norm_rope_quant_kernel
from .launch import heads_of, rows_of
from .tuning import Tuning, power_of_two

DTYPES = {"ocp": torch.float8_e4m3fn, "fnuz": torch.float8_e4m3fnuz}


def _cut(
    tuning: Tuning, dim: int, rotary: int, block: int, power: bool, form: str
) -> dict[str, Any]:
    return {
        "DIM": dim,
        "ROTARY": rotary,
        "QUANT": block,
        "BLOCK": power_of_two(dim),
        "POWER": power,
        "MOST": MOST[form],
        "BIAS": BIAS[form],
        "LEAST_MAGNITUDE": LEAST_MAGNITUDE,
        "num_warps": tuning.warps(power_of_two(dim)),
    }


def inverse_rope_quant(
    tuning: Tuning, x: Tensor, cos: Tensor, sin: Tensor, block: int, power: bool, form: str
) -> tuple[Tensor, Tensor]:
    x = heads_of(x)
    tokens, heads, dim = x.shape
    codes = torch.empty((tokens, heads * dim), dtype=torch.uint8, device=x.device)
    scales = torch.empty((tokens, heads * dim // block), dtype=torch.float32, device=x.device)
    if tokens:
        inverse_rope_quant_kernel[(tokens, heads)](
            x, cos.contiguous(), sin.contiguous(), codes, scales, heads, x.stride(0), x.stride(1),
            **_cut(tuning, dim, 2 * cos.shape[1], block, power, form),
        )  # fmt: skip
    return codes.view(DTYPES[form]), scales


def qk_norm_rope_quant(
    tuning: Tuning,
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
    q, kv = heads_of(q), rows_of(kv)
    tokens, heads, dim = q.shape
    rotary = 2 * cos.shape[1]
    rest = dim - rotary
    made = torch.empty((tokens, heads, dim), dtype=q.dtype, device=q.device)
    codes = torch.empty((tokens, rest), dtype=torch.uint8, device=q.device)
    scales = torch.empty((tokens, rest // block), dtype=torch.float32, device=q.device)
    tail = torch.empty((tokens, rotary), dtype=kv.dtype, device=q.device)
    if tokens:
        qk_norm_rope_quant_kernel[(tokens, heads + 1)](
            q, kv, kv_weight, cos.contiguous(), sin.contiguous(), made, codes, scales, tail,
            heads, eps, q.stride(0), q.stride(1), kv.stride(0),
            **_cut(tuning, dim, rotary, block, power, form),
        )  # fmt: skip
    return made, codes.view(DTYPES[form]), scales, tail
