"""More of what is compiled for every target: rounding to eight-bit floats (DeepSeek-V4 Flash)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from compile_workload_mixers import tensor


def rounding(ops: dict[str, Any]) -> dict[str, Callable[[], object]]:
    """Both formats, whichever the target multiplies: a cache may come from elsewhere."""
    tokens, heads, dim, single = 8, 64, 512, torch.float32
    angles = tensor(tokens, 32, dtype=single), tensor(tokens, 32, dtype=single)
    weight = tensor(dim, dtype=single)
    q, kv = tensor(tokens, heads, dim), tensor(tokens, dim)
    work: dict[str, Callable[[], object]] = {}
    for form in ("ocp", "fnuz"):
        back, key = ops["inverse_rope_quant"], ops["qk_norm_rope_quant"]
        work[f"inverse_rope_quant {form}"] = partial(back, q, *angles, 128, True, form)
        work[f"qk_norm_rope_quant {form}"] = partial(
            key, q, kv, weight, 1e-6, *angles, 64, True, form
        )
    return work
