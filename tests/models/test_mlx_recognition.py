"""Guards that no layer is served as what it is not: parts are told by their attributes, every match
is checked with numbers, and what matches nothing, two things, or the wrong numbers stops the load
with a message that says where."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import ChunkedKVCache
from support.tiny_mlx import CONFIGS, HYBRID, build

from sixfold.common.errors import CheckpointError
from sixfold.platforms.interface_kv import KVKind
from sixfold.platforms.mlx.recognise import recognise_model


def recognise(model: Any) -> Any:
    return recognise_model(model, mx.float32)


WORDS = {
    "llama": "softmax attention (grouped) + MLP",
    "qwen3_moe": "softmax attention (grouped) + mixture of experts",
    "gemma3_text": "softmax attention (grouped, window 8) + MLP",
    "gpt_oss": "softmax attention (grouped, sinks, window 8) + mixture of experts",
    "deepseek_v3": "latent attention (MLA) + MLP",
    "qwen3_5": "gated delta rule + MLP",
    "qwen3_5_moe": "softmax attention (grouped, gated) + mixture of experts",
    "granitemoehybrid": "state space + MLP + mixture of experts",
    "phi3": "softmax attention (grouped) + MLP",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_is_recognised(name: str) -> None:
    found = recognise(build(name))
    assert len(found.layers) == CONFIGS[name]["num_hidden_layers"]
    table = [decision.chosen for decision in found.decisions]
    assert WORDS.get(name, "softmax attention (grouped) + MLP") in table
    kinds = {layer.need.kind for layer in found.layers}
    assert (KVKind.RECURRENT in kinds) == (name in HYBRID)
    assert all(layer.difference < 1e-5 for layer in found.layers)


def test_the_latent_cache_has_unlike_keys_and_values() -> None:
    need = recognise(build("deepseek_v3")).layers[0].need
    assert (need.kv_heads, need.head_dim, need.values_dim) == (1, 16, 8)


def refused(model: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        recognise(model)
    return str(caught.value)


class Stranger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mystery = nn.Linear(32, 32)

    def __call__(self, x: mx.array) -> mx.array:
        return self.mystery(x)


def test_a_part_of_no_kind_is_named_with_what_was_looked_for() -> None:
    model = build("llama")
    model.layers[1].mlp = Stranger()
    said = refused(model)
    assert "layers.1.mlp" in said
    assert "Stranger" in said
    assert "carries: mystery" in said
    assert "down_proj" in said


def test_a_part_of_two_kinds_is_named_with_both() -> None:
    model = build("llama")
    model.layers[0].mlp.o_proj = nn.Linear(32, 32)
    model.layers[0].mlp.q_proj = nn.Linear(32, 32)
    assert "looks like softmax attention and MLP" in refused(model)


def test_a_layer_must_remember_in_one_place() -> None:
    model = build("llama")
    model.layers[0].second_attn = model.layers[1].self_attn
    assert "layers.0" in (said := refused(model))
    assert "has 2 parts that remember" in said
    model = build("llama")
    model.layers[1].pop("self_attn")
    assert "has 0 parts that remember" in refused(model)


def test_an_unknown_cache_is_refused() -> None:
    model = build("llama")
    model.make_cache = lambda: [object(), object()]
    assert "has no update_and_fetch, offset, make_mask" in refused(model)
    model.make_cache = lambda: [object()]
    assert "has 2 layers and asks for 1 caches" in refused(model)


def test_a_window_that_keeps_its_first_tokens_is_refused() -> None:
    from mlx_lm.models.cache import RotatingKVCache

    model = build("llama")
    model.make_cache = lambda: [RotatingKVCache(16, keep=4) for _ in range(2)]
    assert "keeps the first 4 tokens" in refused(model)


class Forgetful(nn.Module):
    """Has all that attention has, and is another where rows run together."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.q_proj, self.o_proj = attention.q_proj, attention.o_proj
        object.__setattr__(self, "inner", attention)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        alone = cache is None or isinstance(cache.offset, int)
        return (1.0 if alone else 1.01) * self.inner(x, mask, cache)


class Mixing(nn.Module):
    """Has all that an MLP has, and lets tokens see one another."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def __call__(self, x: mx.array) -> mx.array:
        return x - x.mean(axis=1, keepdims=True)


def test_the_check_by_numbers_fires() -> None:
    model = build("llama")
    model.layers[1].self_attn = Forgetful(model.layers[1].self_attn)
    said = refused(model)
    assert "layers.1.self_attn" in said
    assert "differs from mlx-lm's own" in said
    model = build("llama")
    model.layers[0].mlp = Mixing(model.layers[0].mlp)
    assert "layers.0.mlp" in (said := refused(model))
    assert "differs" in said


def test_a_head_that_needs_more_than_hidden_states_is_refused() -> None:
    model = build("llama")
    kind = type(model)

    class Odd(kind):  # type: ignore[misc, valid-type]
        def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
            return super().__call__(inputs, cache) + inputs.sum()

    model.__class__ = Odd
    assert "head" in refused(model)


def test_nan_in_a_layer_is_no_match() -> None:
    model = build("llama")
    weight = np.array(model.layers[0].self_attn.v_proj.weight)
    weight[0, 0] = np.nan
    model.layers[0].self_attn.v_proj.weight = mx.array(weight)
    assert "layers.0.self_attn" in refused(model)


def test_a_chunked_cache_is_not_taken_for_a_plain_one() -> None:
    model = build("llama")
    model.make_cache = lambda: [ChunkedKVCache(4) for _ in range(2)]
    assert "has no make_mask" in refused(model)
