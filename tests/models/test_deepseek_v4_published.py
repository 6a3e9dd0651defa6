"""Contract: the published sizes of DeepSeek-V4 are understood: every tensor of the released
checkpoints has its place and none is missing, the lists that also count the draft layer are cut,
and the caches cost what they must. No weights are needed: names and shapes are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.kernel_checks import generic_table

from sixfold.common.checkpoint.checkpoint import Checkpoint, open_checkpoint
from sixfold.common.errors import CheckpointError
from sixfold.models.loading import _assign, build_model
from sixfold.platforms.interface_kv import KVKind

SHARED: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4", "vocab_size": 129280,
    "num_key_value_heads": 1, "head_dim": 512, "qk_rope_head_dim": 64, "sliding_window": 128,
    "o_lora_rank": 1024, "index_n_heads": 64, "index_head_dim": 128, "hc_mult": 4,
    "hc_sinkhorn_iters": 20, "hc_eps": 1e-6, "num_experts_per_tok": 6, "n_shared_experts": 1,
    "num_hash_layers": 3, "scoring_func": "sqrtsoftplus", "topk_method": "noaux_tc",
    "norm_topk_prob": True, "swiglu_limit": 10.0, "rope_theta": 10000,
    "compress_rope_theta": 160000, "rms_norm_eps": 1e-6, "max_position_embeddings": 1048576,
    "num_nextn_predict_layers": 1, "tie_word_embeddings": False, "bos_token_id": 0,
    "eos_token_id": 1, "torch_dtype": "bfloat16",
    "rope_scaling": {"type": "yarn", "factor": 16, "beta_fast": 32, "beta_slow": 1,
                     "original_max_position_embeddings": 65536},
}  # fmt: skip
FLASH: dict[str, Any] = {
    **SHARED, "hidden_size": 4096, "num_hidden_layers": 43, "num_attention_heads": 64,
    "q_lora_rank": 1024, "o_groups": 8, "index_topk": 512, "n_routed_experts": 256,
    "moe_intermediate_size": 2048, "routed_scaling_factor": 1.5,
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
}  # fmt: skip
PRO: dict[str, Any] = {
    **SHARED, "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128,
    "q_lora_rank": 1536, "o_groups": 16, "index_topk": 1024, "n_routed_experts": 384,
    "moe_intermediate_size": 3072, "routed_scaling_factor": 2.5,
    "compress_ratios": [128, *[128, 4] * 30, 0],
}  # fmt: skip
Shapes = Iterator[tuple[str, tuple[int, ...]]]


def published(c: dict[str, Any]) -> Shapes:
    width, streams, vocabulary = c["hidden_size"], c["hc_mult"], c["vocab_size"]
    yield from {"embed.weight": (vocabulary, width), "head.weight": (vocabulary, width)}.items()
    yield "norm.weight", (width,)
    yield from _ends("", c)
    for layer in range(c["num_hidden_layers"]):
        yield from _block(f"layers.{layer}.", c, c["compress_ratios"][layer], layer)
    yield from _block("mtp.0.", c, 0, c["num_hidden_layers"])
    yield from ((f"mtp.0.{name}.weight", (width, width)) for name in ("e_proj", "h_proj"))
    yield from ((f"mtp.0.{name}.weight", (width,)) for name in ("enorm", "hnorm", "norm"))
    yield from _ends("mtp.0.", {**c, "hc_mult": streams})


def _ends(prefix: str, c: dict[str, Any]) -> Shapes:
    streams = c["hc_mult"]
    yield f"{prefix}hc_head_fn", (streams, streams * c["hidden_size"])
    yield f"{prefix}hc_head_base", (streams,)
    yield f"{prefix}hc_head_scale", (1,)


def _block(prefix: str, c: dict[str, Any], ratio: int, layer: int) -> Shapes:
    width, inner, dim = c["hidden_size"], c["moe_intermediate_size"], c["head_dim"]
    rank, heads, streams = c["q_lora_rank"], c["num_attention_heads"], c["hc_mult"]
    groups, experts = c["o_groups"], c["n_routed_experts"]
    found: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (width,),
        "ffn_norm.weight": (width,),
        "attn.wq_a.weight": (rank, width),
        "attn.q_norm.weight": (rank,),
        "attn.wq_b.weight": (heads * dim, rank),
        "attn.wkv.weight": (dim, width),
        "attn.kv_norm.weight": (dim,),
        "attn.attn_sink": (heads,),
        "attn.wo_a.weight": (groups * c["o_lora_rank"], heads * dim // groups),
        "attn.wo_b.weight": (width, groups * c["o_lora_rank"]),
        "ffn.gate.weight": (experts, width),
    }
    for half in ("attn", "ffn"):
        found[f"hc_{half}_fn"] = (24, streams * width)
        found[f"hc_{half}_base"] = (24,)
        found[f"hc_{half}_scale"] = (3,)
    if layer < c["num_hash_layers"]:
        found["ffn.gate.tid2eid"] = (c["vocab_size"], c["num_experts_per_tok"])
    else:
        found["ffn.gate.bias"] = (experts,)
    for name in (*(f"experts.{e}" for e in range(experts)), "shared_experts"):
        found |= {f"ffn.{name}.w1.weight": (inner, width), f"ffn.{name}.w3.weight": (inner, width)}
        found[f"ffn.{name}.w2.weight"] = (width, inner)
    if ratio == 4:
        found |= _compressor("attn.compressor", 4, 2 * dim, dim, width)
        found |= _compressor("attn.indexer.compressor", 4, 256, 128, width)
        found["attn.indexer.wq_b.weight"] = (64 * 128, rank)
        found["attn.indexer.weights_proj.weight"] = (64, width)
    elif ratio == 128:
        found |= _compressor("attn.compressor", 128, dim, dim, width)
    yield from ((f"{prefix}{leaf}", shape) for leaf, shape in found.items())


def _compressor(name: str, ratio: int, columns: int, dim: int, width: int) -> dict[str, Any]:
    return {
        f"{name}.ape": (ratio, columns),
        f"{name}.wkv.weight": (columns, width),
        f"{name}.wgate.weight": (columns, width),
        f"{name}.norm.weight": (dim,),
    }


class Names:
    """A WeightSource of names and shapes."""

    norm_offset = 0.0

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._shapes = shapes

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def where(self, name: str) -> str:
        return f"published: tensor {name!r}"

    def is_spare(self, name: str) -> bool:
        return False


def opened(path: Path, config: dict[str, Any]) -> tuple[Checkpoint, Any]:
    (path / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(path)
    return checkpoint, build_model(checkpoint, generic_table(), torch.bfloat16)


def fewer_experts(config: dict[str, Any]) -> dict[str, Any]:
    """Of hundreds of equal ones."""
    return {**config, "n_routed_experts": 8}


@pytest.mark.parametrize("config", [FLASH, PRO], ids=["flash", "pro"])
def test_every_published_tensor_has_its_place(tmp_path: Path, config: dict[str, Any]) -> None:
    config = fewer_experts(config)
    checkpoint, model = opened(tmp_path, config)
    pieces = _assign(model, Names(dict(published(config))), checkpoint)
    assert set(pieces) == {name for name, _ in model.named_parameters()}
    placed = {piece.tensor for parts in pieces.values() for piece in parts}
    assert {n for n, _ in published(config)} - placed == {
        name for name, _ in published(config) if name.startswith("mtp.")
    }


@pytest.mark.parametrize(
    "lost", ["layers.2.attn.compressor.wgate.weight", "layers.42.ffn.experts.7.w3.weight"]
)
def test_one_lost_tensor_is_missed(tmp_path: Path, lost: str) -> None:
    config = fewer_experts(FLASH)
    checkpoint, model = opened(tmp_path, config)
    shapes = {name: shape for name, shape in published(config) if name != lost}
    with pytest.raises(CheckpointError, match="missing or incomplete"):
        _assign(model, Names(shapes), checkpoint)


@pytest.mark.parametrize(
    ("config", "windows", "sparse", "dense"),
    [(FLASH, 2, 21, 20), (PRO, 0, 30, 31)],
    ids=["flash", "pro"],
)
def test_what_the_caches_cost(
    tmp_path: Path, config: dict[str, Any], windows: int, sparse: int, dense: int
) -> None:
    """In 16 bits; the states in 32."""
    checkpoint, model = opened(tmp_path, config)
    assert checkpoint.context_length == 1048576
    needs = model.cache_needs()
    assert len(model.layers) == windows + sparse + dense
    by_kind = {kind: [n for n in needs if n.kind is kind] for kind in KVKind}
    assert len(by_kind[KVKind.WINDOW]) == len(model.layers)
    per_token = sum(2 * need.head_dim / need.ratio for need in by_kind[KVKind.COMPRESSED])
    assert per_token == sparse * (256 + 64) + dense * 8
    states = sum(need.state_bytes for need in by_kind[KVKind.RECURRENT])
    assert states == (sparse * (64 + 16) + dense * 512) << 10


def test_all_256_experts_are_counted(tmp_path: Path) -> None:
    _, model = opened(tmp_path, FLASH)
    experts = [p for n, p in model.named_parameters() if ".gate_up." in n or ".down." in n]
    assert sum(p.numel() for p in experts) == 43 * 256 * 3 * 4096 * 2048
