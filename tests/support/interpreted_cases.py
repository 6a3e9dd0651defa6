"""Cases of ops that take long in Triton's interpreter: what a run without --all-cases has of them.
Each list has what the kernel does differently: padding, a boundary, an odd size, several parts."""

from __future__ import annotations

FEW: dict[str, tuple[str, ...]] = {
    "gated_delta": ("decode_with_padding", "mixed_with_padding", "odd_dims"),
    "conv1d_update": ("mixed_with_padding", "odd_channels", "more_taps_than_tokens"),
    "latent_attention": ("decode_unlike_lengths", "odd_dims", "prefill_page_1"),
    "compressed_attention": ("decode_selected", "decode_page_128", "one_head_odd_width"),
}
"""Op -> cases."""

CUT_BY_LANES = ("gated_delta", "conv1d_update")
"""Ops that are launched otherwise for 64 lanes than for 32: these run for both."""
