"""Contract: a quantization_config is read to the scheme that it means, or refused with a sentence
that names the file, the field, its value and what is supported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sixfold.common.checkpoint.packed_schemes import AWQ, GPTQ, Compressed, Described, PackedScheme
from sixfold.common.checkpoint.quantization_config import packed_scheme
from sixfold.common.errors import CheckpointError

GPTQ4 = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
AWQ4 = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
BYTES = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
TOKENS = {"num_bits": 8, "type": "int", "dynamic": True, "strategy": "token"}
NIBBLES = {**BYTES, "num_bits": 4, "strategy": "group", "group_size": 128}


DESCRIPTION = {
    "model_quant_type": "W8A8_DYNAMIC",
    "model.layers.0.mlp.up_proj.weight": "W8A8_DYNAMIC",
    "model.layers.0.mlp.up_proj.weight_scale": "W8A8_DYNAMIC",
    "lm_head.weight": "FLOAT",
}


def compressed(form: str, weights: dict[str, Any], inputs: Any = None, **fields: Any) -> dict:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    known = {"quant_method": "compressed-tensors", "format": form}
    return {**known, "config_groups": {"group_0": group}, "ignore": ["lm_head"], **fields}


@pytest.mark.parametrize(
    ("weights", "name"),
    [
        (BYTES, "int8_token"),
        ({**BYTES, "strategy": "tensor"}, "int8_token"),
        ({**BYTES, "symmetric": False}, "int8_channel"),
        ({**BYTES, "strategy": "group", "group_size": 64}, "int8_group"),
    ],
)
def test_activations_are_rounded_where_one_scale_an_output_allows(
    weights: dict[str, Any], name: str
) -> None:
    scheme = read(compressed("int-quantized", weights, TOKENS))
    assert scheme is not None
    assert scheme.name == name


def read(config: Any) -> PackedScheme | None:
    return packed_scheme({"quantization_config": config}, Path("dir/config.json"))


@pytest.mark.parametrize(
    ("config", "scheme"),
    [
        (None, None),
        ({}, None),
        (GPTQ4, GPTQ(4, 128, 1, False)),
        ({**GPTQ4, "bits": 8, "group_size": -1, "desc_act": True}, GPTQ(8, -1, 1, True)),
        ({**GPTQ4, "checkpoint_format": "gptq"}, GPTQ(4, 128, 1, False)),
        ({**GPTQ4, "checkpoint_format": "gptq_v2"}, GPTQ(4, 128, 0, False)),
        ({**GPTQ4, "format": "GPTQ_V2", "quant_method": "GPTQ"}, GPTQ(4, 128, 0, False)),
        ({**GPTQ4, "dynamic": {"-:.*down_proj": {}}}, GPTQ(4, 128, 1, False)),
        (AWQ4, AWQ(128)),
        ({**AWQ4, "version": "GEMM", "group_size": 64}, AWQ(64)),
        ({"quant_method": "awq", "bits": 4, "group_size": 32, "format": "gemm"}, AWQ(32)),
        (compressed("int-quantized", BYTES), Compressed(8, False, -1, True)),
        (
            compressed("int-quantized", BYTES, {"num_bits": 8, "type": "int", "dynamic": True}),
            Compressed(8, False, -1, True),
        ),
        (compressed("int-quantized", BYTES, TOKENS), Compressed(8, False, -1, True, False, True)),
        (
            compressed("int-quantized", BYTES, {**TOKENS, "symmetric": False}),
            Compressed(8, False, -1, True),
        ),
        (
            compressed("int-quantized", BYTES, {**TOKENS, "strategy": "tensor"}),
            Compressed(8, False, -1, True),
        ),
        (
            compressed(
                "int-quantized",
                BYTES,
                config_groups={
                    "a": {"weights": BYTES, "input_activations": TOKENS},
                    "b": {"weights": BYTES},
                },
            ),
            Compressed(8, False, -1, True),
        ),
        (
            compressed("int-quantized", {**BYTES, "strategy": "tensor"}),
            Compressed(8, False, -1, True, one_scale=True),
        ),
        (compressed("pack-quantized", NIBBLES), Compressed(4, True, 128, True)),
        (DESCRIPTION, Described()),
        ({"model_quant_type": "", "lm_head.weight": "FLOAT", "version": "1.0.0"}, Described()),
        (
            compressed("pack-quantized", {**NIBBLES, "symmetric": False}),
            Compressed(4, True, 128, False),
        ),
    ],
)
def test_what_is_read(config: Any, scheme: PackedScheme | None) -> None:
    assert read(config) == scheme


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({**GPTQ4, "bits": 3}, ["'bits'", "gptq", "3", "4, 8"]),
        ({**GPTQ4, "bits": None}, ["'bits'", "None"]),
        ({**GPTQ4, "bits": True}, ["'bits'", "True"]),
        ({**GPTQ4, "group_size": 16}, ["'group_size'", "16", "-1 and multiples of 32"]),
        ({**GPTQ4, "group_size": 0}, ["'group_size'", "0"]),
        ({**GPTQ4, "group_size": None}, ["'group_size'", "None"]),
        ({**GPTQ4, "desc_act": "yes"}, ["'desc_act'", "yes"]),
        ({**GPTQ4, "checkpoint_format": "marlin"}, ["'checkpoint_format'", "gptq, gptq_v2"]),
        ({**GPTQ4, "is_marlin_format": True}, ["'is_marlin_format'", "none"]),
        ({**GPTQ4, "pack_dtype": "int16"}, ["'pack_dtype'", "int32"]),
        ({**GPTQ4, "rotation": "hadamard"}, ["'rotation'", "hadamard"]),
        ({**GPTQ4, "dynamic": {"+:.*": {"bits": 8}}}, ["'dynamic'", "-:"]),
        ({**AWQ4, "bits": 8}, ["'bits'", "awq", "8"]),
        ({**AWQ4, "version": "gemv"}, ["'version'", "'gemv'", "gemm"]),
        ({**AWQ4, "zero_point": False}, ["'zero_point'", "False", "True"]),
        (compressed("float-quantized", BYTES), ["'format'", "float-quantized", "int-quantized"]),
        (compressed("pack-quantized", {**NIBBLES, "num_bits": 3}), ["weights.num_bits'", "4, 8"]),
        (compressed("int-quantized", {**BYTES, "type": "float"}), ["weights.type'", "float"]),
        (
            compressed("pack-quantized", {**NIBBLES, "strategy": "block"}),
            ["'config_groups.group_0.weights.strategy'", "block", "group, channel"],
        ),
        (
            compressed("int-quantized", BYTES, {"num_bits": 8, "type": "int", "dynamic": False}),
            ["'config_groups.group_0.input_activations.dynamic'", "False"],
        ),
        (compressed("int-quantized", BYTES, kv_cache_scheme={"num_bits": 8}), ["kv_cache_scheme"]),
        (
            compressed("int-quantized", BYTES, sparsity_config={"format": "sparse-24-bitmask"}),
            ["sparsity_config"],
        ),
        (compressed("int-quantized", BYTES, config_groups={}), ["'config_groups'"]),
        (
            compressed(
                "pack-quantized",
                NIBBLES,
                config_groups={"a": {"weights": NIBBLES}, "b": {"weights": BYTES}},
            ),
            ["'config_groups'", "alike"],
        ),
        ({**DESCRIPTION, "a.b.weight": "W8A8"}, ["'a.b.weight'", "modelslim", "w8a8_dynamic"]),
        ({**DESCRIPTION, "kv_cache_type": "C8"}, ["'kv_cache_type'", "C8", "none"]),
        ({**DESCRIPTION, "metadata": {"quarot": {}}}, ["'metadata'", "none"]),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ["bitsandbytes", "gptq", "awq"]),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, ["fp8", "'weight_block_size'"]),
        ({"bits": 4}, ["unnamed method"]),
        ("gptq", ["must be an object"]),
    ],
)
def test_what_is_refused(config: Any, says: list[str]) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(config)
    text = str(caught.value)
    assert text.startswith("dir/config.json: ")
    assert "quantization_config" in text
    assert text.endswith(".")
    assert "\n" not in text
    for part in says:
        assert part in text, text
