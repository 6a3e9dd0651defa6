"""Which form the matrices of a model are kept in.

A scheme belongs to a layer: "int8", "int4" and "fp8" are made on load, the others are forms that a
checkpoint stores and that are kept as they are. Kernels that take a scheme say so in `requires`.
docs/weights.md has the table.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .base import Model
from .experts import ExpertStack
from .layers import Embedding, Layer, Linear

BITS = {
    "bfloat16": 16.0, "float16": 16.0, "int8": 8.5, "int4": 5.0, "q4_0": 4.5, "q4_1": 5.0,
    "q4_k": 5.0, "q5_0": 8.5, "q5_1": 9.0, "q5_k": 9.0, "q6_k": 9.0, "q8_0": 8.5,
    "gptq_int4": 5.0, "gptq_int8": 9.0, "awq_int4": 5.0, "packed_int4": 5.0, "packed_int8": 9.0,
    "int8_channel": 9.0, "int8_token": 9.0, "int8_group": 9.0, "fp8": 8.5, "fp8_block": 8.5,
    "mxfp4": 4.5,
}  # fmt: skip
"""Bits that a weight takes in memory, scales included, at most."""

MADE_ON_LOAD = ("int8", "int4", "fp8")

FLOATS = {"bfloat16": torch.bfloat16, "float16": torch.float16}
"""Schemes that are a dtype narrower than that of the computation: widening is exact."""


def assign_schemes(model: Model, quantize: str, stored: Mapping[str, str]) -> None:
    """`quantize`: "int8" for every matrix; "int4" for all but those that four bits harm most, which
    get int8: the embedding and the head (they alone cost a tenth in perplexity, SmolLM2-135M), and
    a dense MLP's way down (of Gemma-3-270M's loss nearly half); "fp8" for products alone, without
    the head and experts. Routers stay as they are. "stored" takes `stored`, parameter name ->
    scheme; "" leaves all in the weights' dtype."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Layer)}
    if quantize in MADE_ON_LOAD:
        for name, layer in layers.items():
            ends = isinstance(layer, Embedding) or name == "lm_head"
            if not layer.rounds_on_load:
                continue
            if quantize != "fp8":
                down = isinstance(layer, Linear) and name.endswith(".down_proj")
                layer.scheme = "int8" if ends or down else quantize
            elif isinstance(layer, Linear) and not ends:
                layer.scheme = quantize
    elif quantize == "stored":
        for parameter, scheme in stored.items():
            layers[_owner(parameter, layers)].scheme = scheme


def _owner(parameter: str, layers: Mapping[str, Layer]) -> str:
    """The layer around a parameter; a mixture's owns its stacked experts."""
    name = parameter.rpartition(".")[0]
    while name and name not in layers:
        name = name.rpartition(".")[0]
    return name


def has_quantised(model: Model) -> bool:
    """Whether a matrix is kept in fewer bits than a float has."""
    schemes = {module.scheme for module in model.modules() if isinstance(module, Layer)}
    return not schemes <= {"", *FLOATS}


def weight_bytes(model: Model) -> int:
    """Bytes of all distinct parameters as they will be kept (tied tensors count once)."""
    seen: dict[int, float] = {}
    for module in model.modules():
        matrix = module.weight if isinstance(module, Linear | Embedding | ExpertStack) else None
        bits = BITS.get(module.scheme) if isinstance(module, Layer) else None
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            size = tensor.element_size() * 8
            quantised = bits is not None and tensor is matrix
            seen[id(tensor)] = tensor.numel() * (bits if quantised and bits else size) / 8
    return int(sum(seen.values()))
