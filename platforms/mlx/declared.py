"""What a configuration says of a model beside what the recognised layers do.

mlx-lm's model files read the fields that they know. A window or a cap of which one takes no notice
changes nothing at load, and the answers: so both are compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...common.checkpoint.checkpoint import Checkpoint
from ...common.decisions import DecisionLog
from ...common.errors import CheckpointError, ConfigError
from .model_config import FULL, SLIDING

CAPS = ("final_logit_softcapping", "attn_logit_softcapping")
"""Fields that are null where nothing is capped."""


def check_caps(model: Any, checkpoint: Checkpoint) -> None:
    """Raises CheckpointError for a cap that no part of the model has in its arguments."""
    for name in CAPS:
        value = checkpoint.config.get(name)
        if value and not any(hasattr(args, name) for args in _arguments(model)):
            raise CheckpointError(
                f"{checkpoint.config_file}: field {name!r} is {value!r}, and mlx-lm's file for "
                f"{checkpoint.architecture!r} does not read it: it would answer without the cap."
            )


def note_angles(checkpoint: Checkpoint, log: DecisionLog) -> None:
    """mlx-lm's YaRN rounds the range in which angles go over from one scale to the other."""
    config = checkpoint.config
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("truncate") is False:
        because = "its file does not read the configuration's `truncate: false`: it rounds a range"
        log.add("rotary angles", "mlx-lm's", because)


def _arguments(model: Any) -> Iterable[Any]:
    found = (getattr(module, "args", None) for module in model.modules())
    return (args for args in found if args is not None)


def context_length(
    checkpoint: Checkpoint, windows: Sequence[int], wanted: int | None, log: DecisionLog
) -> int:
    """Tokens up to which a row is answered as the configuration says. `windows`: of each layer as
    it was recognised, 0 = none; `wanted`: --max-context. Raises CheckpointError where a layer sees
    less than it should, ConfigError for a context beyond a window that no layer keeps."""
    said, most = declared_windows(checkpoint.config, windows), checkpoint.context_length
    narrow = [i for i, (a, b) in enumerate(zip(said, windows, strict=True)) if b and b < (a or b)]
    types = checkpoint.config.get("layer_types")
    if isinstance(types, list):
        narrow += [i for i, kind in enumerate(types[: len(windows)]) if kind == FULL and windows[i]]
    if narrow:
        raise CheckpointError(
            f"layers.{narrow[0]} attends within {windows[narrow[0]]} tokens in mlx-lm's file for "
            f"{checkpoint.architecture!r}, and not by {checkpoint.config_file}."
        )
    lost = [a for a, b in zip(said, windows, strict=True) if a and not 0 < b <= a]
    if not lost or min(lost) >= most:
        return most
    because = (
        f"the configuration has {len(lost)} layers with a window of {min(lost)} tokens, and "
        f"mlx-lm's file for {checkpoint.architecture!r} keeps none; up to there both are the same"
    )
    if wanted is not None and wanted > min(lost):
        raise ConfigError(f"max_context {wanted}: {because}. Choose at most {min(lost)}.")
    log.add("context", f"{min(lost)} of {most} tokens", because)
    return min(lost)


def declared_windows(config: Mapping[str, Any], found: Sequence[int]) -> tuple[int, ...]:
    """The window of each layer by the configuration, 0 = none. Where that does not say which layers
    have one and the file gives one to some, these are they."""
    size, layers = config.get("sliding_window"), len(found)
    if not isinstance(size, int) or not config.get("use_sliding_window", True):
        return (0,) * layers
    types, pattern = config.get("layer_types"), config.get("sliding_window_pattern")
    if isinstance(types, list):
        return tuple(size if kind == SLIDING else 0 for kind in (types + [FULL] * layers)[:layers])
    if isinstance(pattern, int) and pattern > 0:
        return tuple(size if (i + 1) % pattern else 0 for i in range(layers))
    if any(found):
        return tuple(found)
    first = config.get("max_window_layers", 0) if "use_sliding_window" in config else 0
    return tuple(size if i >= first else 0 for i in range(layers))
