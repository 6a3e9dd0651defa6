"""Which layers attend within a sliding window, from the forms that configurations use."""

from __future__ import annotations

from collections.abc import Callable

from ..common.checkpoint.fields import Fields

SLIDING, FULL = "sliding_attention", "full_attention"


def layer_types(fields: Fields, layers: int, sliding: Callable[[int], bool]) -> tuple[str, ...]:
    """One of SLIDING and FULL per layer: the configuration's own list, else `sliding(layer)`."""
    given = fields.optional("layer_types")
    if given is None:
        return tuple(SLIDING if sliding(i) else FULL for i in range(layers))
    if not isinstance(given, list) or not set(given) <= {SLIDING, FULL} or len(given) < layers:
        raise fields.unsupported("layer_types", f"{layers} times {FULL} or {SLIDING}")
    return tuple(given[:layers])


def window_sizes(fields: Fields, types: tuple[str, ...]) -> tuple[int, ...]:
    """The window of each layer in tokens; 0 = unlimited."""
    window = fields.positive("sliding_window") if SLIDING in types else 0
    return tuple(window if kind == SLIDING else 0 for kind in types)


def qwen_windows(fields: Fields, layers: int) -> tuple[int, ...]:
    """Qwen2 and Qwen3: the window counts only with `use_sliding_window`, and then from layer
    `max_window_layers` on unless the layers are listed."""
    if not fields.flag("use_sliding_window", False) or fields.optional("sliding_window") is None:
        return (0,) * layers
    first = fields.integer("max_window_layers", 28)
    return window_sizes(fields, layer_types(fields, layers, lambda layer: layer >= first))
