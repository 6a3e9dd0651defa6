"""GGUF files on MLX: the shared loader's tensors in an mlx-lm model.

Types with one 16-bit scale for 32 numbers have MLX's affine form exactly: w = scale * q + bias.
Others (the K types, whose scales are products) are converted to floats.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...common.checkpoint.checkpoint import Checkpoint
from ...common.checkpoint.gguf_weights import GGUFWeights
from ...common.checkpoint.quantised_rows import QuantisedRows
from ...common.errors import CheckpointError
from .model_config import for_mlx_lm

GROUP = 32
OFFSETS = {"q8_0": 128, "q5_0": 16, "q5_1": 0, "q4_0": 0, "q4_1": 0}
"""Types that are kept, and what is added to a number as taken apart so that it is not negative."""
ROWS_AT_ONCE = 4096


def load_gguf(
    checkpoint: Checkpoint, keep_blocks: bool, dtype: mx.Dtype
) -> tuple[Any, dict[str, Any]]:
    """An mlx-lm model with the file's weights. `keep_blocks`: matrices stay quantised; what is
    converted becomes `dtype`."""
    from mlx_lm.utils import _get_classes

    config = {**checkpoint.config, **for_mlx_lm(checkpoint.config)}
    try:
        model_class, arguments = _get_classes(config)
        model = model_class(arguments.from_dict(config))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint.path}: mlx-lm cannot build this model: {error}"
        ) from error
    source = GGUFWeights(checkpoint.path)
    schemes = {name: source.scheme(name) for name in source.names()} if keep_blocks else {}
    weights: dict[str, mx.array] = {}
    bits: dict[str, int] = {}  # of the modules that stay quantised
    for name in source.names():
        if schemes.get(name) in OFFSETS:
            rows = source.quantised_rows(name)
            bits[name.removesuffix(".weight")] = rows.bits
            weights.update(_packed(name, rows, OFFSETS[schemes[name]]))
        else:
            weights[name] = _floats(source, name, dtype)
    if hasattr(model, "sanitize"):
        weights = model.sanitize(weights)
    if bits:

        def form(path: str, module: nn.Module) -> bool | dict[str, Any]:
            return {"group_size": GROUP, "bits": bits[path]} if path in bits else False

        nn.quantize(model, class_predicate=form)
        config["quantization"] = {"group_size": GROUP, "bits": min(bits.values())}
    model.eval()
    try:
        model.load_weights(list(weights.items()))
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error
    return model, config


def _floats(source: GGUFWeights, name: str, dtype: mx.Dtype) -> mx.array:
    shape = source.shape(name)
    if len(shape) == 1:
        values = source.read_rows(name, 0, 1)[0]
        return mx.array(values - source.norm_offset if "norm" in name else values)
    step = source.row_step(name) * max(1, ROWS_AT_ONCE // source.row_step(name))
    parts = []
    for start in range(0, shape[0], step):
        rows = source.read_rows(name, start, min(start + step, shape[0]))
        parts.append(mx.array(rows).astype(dtype))
        mx.eval(parts[-1])
    return mx.concatenate(parts)


def _packed(name: str, rows: QuantisedRows, offset: int) -> dict[str, mx.array]:
    """weight (N, K * bits / 32) uint32, scales and biases (N, K / 32), as MLX's affine form."""
    base = name.removesuffix(".weight")
    q = (rows.q.astype(np.int16) + offset).astype(np.uint8).reshape(len(rows.q), -1)
    packed = q if rows.bits == 8 else q[:, 0::2] | (q[:, 1::2] << 4)
    if rows.bits == 4:
        offset = 0 if rows.minimum is not None else 8
    bias = -rows.scale * offset if rows.minimum is None else -rows.minimum
    words = np.ascontiguousarray(packed).view("<u4")
    return {
        f"{base}.weight": mx.array(words),
        f"{base}.scales": mx.array(rows.scale).astype(mx.float16),
        f"{base}.biases": mx.array(bias).astype(mx.float16),
    }
