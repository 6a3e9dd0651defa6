"""Cases of ops that take long in Triton's interpreter: what a run without --all-cases has of them.
Each list has what the kernel does differently: padding, a boundary, an odd size, several parts."""

from __future__ import annotations

FEW: dict[str, tuple[str, ...]] = {
    "gated_delta": ("decode_with_padding", "mixed_with_padding", "odd_dims"),
    "conv1d_update": ("mixed_with_padding", "odd_channels", "more_taps_than_tokens"),
    "latent_attention": ("decode_unlike_lengths", "odd_dims", "prefill_page_1"),
    "mhc_post": ("odd_width",),
    "mhc_pre": ("sinkhorn_2", "saturated"),
    "mhc_post_pre": ("two_streams", "beyond_a_tile"),
    "mhc_head": ("odd_width",),
    "compress_norm_rope_store": ("padding", "mixed_padding", "odd_width"),
    "index_topk": ("decode", "one_head", "all_equal"),
    "inverse_rope_quant": ("rest_beside_turned_fnuz", "published_head_ocp_power", "no_tokens_ocp"),
    "qk_norm_rope_quant": ("rest_beside_turned_ocp", "published_head_fnuz_power", "no_tokens_ocp"),
    "compressed_attention": ("decode_selected", "decode_page_128", "one_head_odd_width"),
}
"""Op -> cases."""

ON_64_LANES = {
    "gated_delta": FEW["gated_delta"],
    "conv1d_update": FEW["conv1d_update"][:1],
    "mhc_post_pre": ("two_streams",),
    "inverse_rope_quant": FEW["inverse_rope_quant"],
    "qk_norm_rope_quant": FEW["qk_norm_rope_quant"],
}
"""Those that are launched otherwise for 64 lanes than for 32: cases that run for both."""
