"""Guards against a silent wrong answer: a configuration as transformers 5 writes it must mean the
same to mlx-lm's model files, which read the older keys and have defaults for what they miss."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import _get_classes
from support.tiny_mlx import CONFIGS

from sixfold.common.checkpoint.gguf_config import FREQUENCY_FACTORS
from sixfold.platforms.mlx.declared import declared_windows
from sixfold.platforms.mlx.model_config import for_mlx_lm

BASE = {"model_type": "llama", "max_position_embeddings": 256}


def test_flat_keys_are_left_alone() -> None:
    assert for_mlx_lm({**BASE, "rope_theta": 5e5}) == {}
    assert for_mlx_lm({**BASE, "rope_theta": 5.0, "rope_parameters": {"rope_theta": 7.0}}) == {}


def test_the_base_is_found_where_transformers_5_puts_it() -> None:
    rope = {"rope_type": "default", "rope_theta": 1e5, "partial_rotary_factor": 0.5}
    assert for_mlx_lm({**BASE, "rope_parameters": rope}) == {
        "rope_theta": 1e5,
        "partial_rotary_factor": 0.5,
    }


def test_scaling_is_kept() -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e5, "factor": 4.0}
    assert for_mlx_lm({**BASE, "rope_parameters": rope})["rope_scaling"] == rope


def test_bases_by_kind_of_layer_and_the_text_part() -> None:
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    flat = {
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": rope["full_attention"],
    }
    assert for_mlx_lm({**BASE, "rope_parameters": rope}) == flat
    text = {"hidden_size": 8, "rope_parameters": rope}
    assert for_mlx_lm({**BASE, "text_config": text}) == {"text_config": {**text, **flat}}


def test_divisors_of_a_gguf_file_reach_the_angles() -> None:
    factors = [1.0, 2.0, 4.0, 8.0]
    rope = {"rope_type": FREQUENCY_FACTORS, "rope_theta": 100.0, "factors": factors}
    config = {"model_type": "llama", **CONFIGS["llama"], "rope_parameters": rope}
    del config["rope_theta"]
    config |= for_mlx_lm(config)
    model_class, arguments = _get_classes(config)
    rotate = model_class(arguments.from_dict(config)).layers[0].self_attn.rope
    x = np.random.default_rng(0).standard_normal((1, 1, 1, 8)).astype(np.float32)
    angle = 3 / (100.0 ** (np.arange(4) / 4) * np.array(factors))
    first, second = x[..., :4], x[..., 4:]
    expected = np.concatenate(
        [
            first * np.cos(angle) - second * np.sin(angle),
            second * np.cos(angle) + first * np.sin(angle),
        ],
        axis=-1,
    )
    np.testing.assert_allclose(np.array(rotate(mx.array(x), offset=3)), expected, atol=1e-5)


SLIDES, FULL = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    ("config", "found", "windows"),
    [
        ({}, (0, 0), (0, 0)),
        ({"sliding_window": None}, (0, 0), (0, 0)),
        ({"sliding_window": 8}, (0, 0), (8, 8)),
        ({"sliding_window": 8, "use_sliding_window": False}, (0, 0), (0, 0)),
        (
            {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
            (0, 0),
            (0, 8),
        ),
        ({"sliding_window": 8, "max_window_layers": 1}, (0, 0), (8, 8)),
        ({"sliding_window": 8, "layer_types": [SLIDES, FULL]}, (0, 0), (8, 0)),
        ({"sliding_window": 8, "layer_types": [FULL]}, (8, 8), (0, 0)),
        ({"sliding_window": 8, "sliding_window_pattern": 2}, (0, 0, 0), (8, 0, 8)),
        ({"sliding_window": 8, "sliding_window_pattern": "LG"}, (8, 0), (8, 0)),
        ({"sliding_window": 8}, (8, 0), (8, 0)),
    ],
)
def test_windows_of_a_configuration(
    config: dict[str, Any], found: tuple[int, ...], windows: tuple[int, ...]
) -> None:
    assert declared_windows(config, found) == windows


def test_layers_under_the_names_that_mlx_lm_reads() -> None:
    words = {"layer_types": ["linear_attention", FULL], "mamba_d_state": 8}
    assert for_mlx_lm({**BASE, **words}) == {"layer_types": ["mamba", "attention"]}
    del words["mamba_d_state"]
    assert for_mlx_lm({**BASE, **words}) == {}
    types = {"layer_types": [SLIDES, FULL, SLIDES, FULL], "_sliding_window_pattern": 6}
    assert for_mlx_lm({**BASE, **types}) == {"sliding_window_pattern": 2}
    types["layer_types"] = [SLIDES, FULL, FULL, SLIDES]
    assert for_mlx_lm({**BASE, **types}) == {}
    experts = {"moe_intermediate_size": 8, "num_local_experts": 4}
    assert for_mlx_lm({**BASE, **experts}) == {"num_experts": 4}
    assert for_mlx_lm({**BASE, **experts, "num_experts": 4}) == {}
    assert for_mlx_lm({**BASE, "text_config": {"vocab_size": 9}}) == {"vocab_size": 9}
