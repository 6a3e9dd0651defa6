"""Cases of ops that take long in Triton's interpreter: what a run without --all-cases has of them.
Each list has what the kernel does differently: padding, a boundary, an odd size, several parts."""

from __future__ import annotations

FEW: dict[str, tuple[str, ...]] = {
    "gated_delta": ("decode_with_padding", "mixed_with_padding", "odd_dims"),
    "conv1d_update": ("mixed_with_padding", "odd_channels", "more_taps_than_tokens"),
}
"""Op -> cases; none named: all."""
