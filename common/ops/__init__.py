"""Every op of the engine: its meaning in numpy, its test cases, its tolerances."""

from __future__ import annotations

from ...platforms.interface_kernels import Op
from . import (
    activation,
    attention,
    dense,
    logprobs,
    moe,
    norm,
    page_digest,
    page_gather,
    paged_attention,
    paging,
    rope,
    sample,
)

MODULES = (
    dense,
    norm,
    rope,
    activation,
    moe,
    paging,
    page_gather,
    page_digest,
    attention,
    paged_attention,
    sample,
    logprobs,
)

OPS: dict[str, Op] = {op.name: op for module in MODULES for op in module.OPS}
