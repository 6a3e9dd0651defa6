"""From a model on disk to an mlx-lm model, quantised or not, with what was decided on the way."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map_with_path

from ...common.checkpoint.checkpoint import Checkpoint
from ...common.decisions import DecisionLog
from ...common.errors import CheckpointError, ConfigError
from ..interface import EngineSpec
from .gguf import load_gguf
from .memory import on_metal
from .model_config import for_mlx_lm

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
BITS = {"int8": 8, "int4": 4}
GROUP = 64
"""Weights that share a scale when matrices are quantised on load; mlx-lm's own default."""


def load_model(
    checkpoint: Checkpoint, spec: EngineSpec, log: DecisionLog
) -> tuple[Any, dict[str, Any]]:
    """The model, its weights not yet read, and its configuration. Raises CheckpointError."""
    if checkpoint.format == "gguf":
        keeps = spec.quantize is None and on_metal()
        dtype = DTYPES[spec.dtype or ("float16" if on_metal() else "float32")]
        model, config = load_gguf(checkpoint, keeps, dtype)
    else:
        model, config = _from_directory(checkpoint)
    _weights(model, config, spec, log, checkpoint)
    _dtype(model, spec, log)
    return model, config


def _from_directory(checkpoint: Checkpoint) -> tuple[Any, dict[str, Any]]:
    from mlx_lm.utils import load_config
    from mlx_lm.utils import load_model as load

    try:
        stored = load_config(checkpoint.path)
        return load(checkpoint.path, lazy=True, model_config=for_mlx_lm(stored))
    except (ValueError, KeyError, TypeError, OSError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{checkpoint.path}: mlx-lm cannot load this model "
            f"(model_type {checkpoint.architecture!r}): {error}"
        ) from error


def _weights(
    model: Any, config: dict[str, Any], spec: EngineSpec, log: DecisionLog, checkpoint: Checkpoint
) -> None:
    stored = config.get("quantization")
    name = _scheme(stored) if stored else ""
    wanted = spec.quantize
    if wanted is None:
        if stored:
            log.add("weights", name, "kept as the checkpoint stores them")
        elif checkpoint.format == "gguf" and not on_metal():
            because = (
                "MLX's quantised products do about 2 GFLOP/s on a CPU; on Metal blocks are kept"
            )
            log.add("weights", "dequantised", because, fallback=False)
        else:
            log.add("weights", "as stored", "the checkpoint has no narrower form of its matrices")
    elif wanted == "none":
        if stored:
            from mlx_lm.utils import dequantize_model

            dequantize_model(model)
        log.add("weights", "dequantised" if stored else "as stored", "set by the user")
    elif stored:
        raise ConfigError(
            f"--quantize {wanted}: the checkpoint is {name} already; leave --quantize out, or use "
            "a checkpoint in 16 bits."
        )
    elif wanted not in BITS:
        raise ConfigError(
            f"--quantize {wanted} is not served on this platform; use {' or '.join(BITS)}."
        )
    else:
        from mlx_lm.utils import quantize_model

        with contextlib.redirect_stdout(io.StringIO()):  # it prints a line of its own
            quantize_model(model, config, GROUP, BITS[wanted])
        log.add("weights", f"{BITS[wanted]} bits, groups of {GROUP}", "set by the user")


def _scheme(quantization: dict[str, Any]) -> str:
    mode = quantization.get("mode", "affine")
    return f"{mode} {quantization['bits']} bits, groups of {quantization['group_size']}"


def _dtype(model: Any, spec: EngineSpec, log: DecisionLog) -> None:
    stored = compute_dtype(model)
    if spec.dtype is not None:
        wanted, because = spec.dtype, "set by the user"
    elif on_metal():
        wanted, because = stored, "what the checkpoint stores"
    else:
        wanted, because = "float32", "the fast dtype of MLX on a CPU"
    log.add("dtype", wanted, because)
    if wanted == stored and wanted != "float32":
        return
    keep = getattr(model, "cast_predicate", lambda path: True)
    target = DTYPES[wanted]

    def cast(path: str, value: mx.array) -> mx.array:
        if keep(path) and mx.issubdtype(value.dtype, mx.floating):
            return value.astype(target)
        return value

    model.update(tree_map_with_path(cast, model.parameters()))


def compute_dtype(model: Any) -> str:
    """The dtype of most of the floating parameters."""
    sizes = dict.fromkeys(DTYPES, 0)
    names = {dtype: name for name, dtype in DTYPES.items()}
    for _, value in tree_flatten(model.parameters()):
        if value.dtype in names:
            sizes[names[value.dtype]] += value.size
    return max(sizes, key=lambda name: sizes[name])


def weight_bytes(model: Any) -> int:
    return sum(int(value.nbytes) for _, value in tree_flatten(model.parameters()))
