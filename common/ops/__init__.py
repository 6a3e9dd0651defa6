"""Every op of the engine: its meaning in numpy, its test cases, its tolerances."""

from __future__ import annotations

from ...platforms.interface_kernels import Op
from . import (
    activation,
    attention,
    compress,
    compressed_attention,
    conv1d_update,
    dense,
    draw,
    fp8_rows,
    gated_delta,
    hyper_connections,
    index_topk,
    interleaved_rope,
    latent_attention,
    logprobs,
    merge_state,
    moe,
    moe_route,
    norm,
    page_digest,
    page_gather,
    paged_attention,
    paging,
    quantised_experts,
    quantised_linear,
    rope,
    sample,
    segment_attention,
    token_rounded_linear,
)

MODULES = (
    dense,
    quantised_linear,
    token_rounded_linear,
    norm,
    rope,
    interleaved_rope,
    fp8_rows,
    activation,
    hyper_connections,
    moe_route,
    moe,
    quantised_experts,
    conv1d_update,
    gated_delta,
    paging,
    page_gather,
    page_digest,
    attention,
    paged_attention,
    latent_attention,
    compress,
    index_topk,
    compressed_attention,
    merge_state,
    segment_attention,
    sample,
    draw,
    logprobs,
)

OPS: dict[str, Op] = {op.title: op for module in MODULES for op in module.OPS}
"""By title: the name, and the scheme of quantised weights behind a slash."""
