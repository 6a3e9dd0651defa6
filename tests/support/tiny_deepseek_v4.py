"""A tiny random DeepSeek-V4 in the published form, a directory that both the engine and
transformers read: every kind of layer, both ways of routing, a draft layer that is left out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "vocab_size": 256,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 32,
    "o_groups": 2,
    "o_lora_rank": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "num_hash_layers": 1,
    "num_nextn_predict_layers": 1,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 10.0,
    "hidden_act": "silu",
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6,
    # Few heads make scores of exactly 0, whose order transformers leaves open.
    "index_n_heads": 16,
    "index_head_dim": 16,
    "index_topk": 4,
    "sliding_window": 8,
    "compress_ratios": [0, 0, 4, 128, 4, 0],
    "compress_rate_hca": 16,
    "compress_rope_theta": 160000,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "beta_fast": 32,
        "beta_slow": 1,
        "original_max_position_embeddings": 256,
    },
    "max_position_embeddings": 4096,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "float32",
}


class _Random:
    """Matrices of useful size; vectors away from the 0 and 1 that hide a forgotten step."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=self._generator) * scale

    def matrix(self, outputs: int, inputs: int) -> Tensor:
        return self.normal(outputs, inputs, scale=1.3 * inputs**-0.5)

    def norm(self, width: int) -> Tensor:
        return 1 + self.normal(width, scale=0.1)

    def uniform(self, count: int) -> Tensor:
        return 0.5 + 0.5 * torch.rand(count, generator=self._generator)

    def distinct(self, rows: int, count: int, below: int) -> Tensor:
        """(rows, count) int64, no number twice in a row."""
        return (
            torch.rand(rows, below, generator=self._generator).argsort(-1)[:, :count].contiguous()
        )


def tensors(config: Mapping[str, Any] = CONFIG, seed: int = 0) -> dict[str, Tensor]:
    """All of a checkpoint's tensors by their published names, float32 but for ids."""
    c, r = config, _Random(seed)
    width, streams = c["hidden_size"], c["hc_mult"]
    found = {
        "embed.weight": r.normal(c["vocab_size"], width),
        "head.weight": r.matrix(c["vocab_size"], width) * 2,
        "norm.weight": r.norm(width),
        "hc_head_fn": r.matrix(streams, streams * width),
        "hc_head_base": r.normal(streams, scale=0.5),
        "hc_head_scale": r.uniform(1),
    }
    for layer in range(c["num_hidden_layers"]):
        found |= _block(c, r, f"layers.{layer}", c["compress_ratios"][layer], layer)
    found |= _block(c, r, "mtp.0", 0, c["num_hash_layers"])
    found |= {f"mtp.0.{name}.weight": r.matrix(width, width) for name in ("e_proj", "h_proj")}
    found |= {f"mtp.0.{name}.weight": r.norm(width) for name in ("enorm", "hnorm", "norm")}
    return found | {
        "mtp.0.hc_head_fn": r.matrix(streams, streams * width),
        "mtp.0.hc_head_base": r.normal(streams, scale=0.5),
        "mtp.0.hc_head_scale": r.uniform(1),
    }


def _block(
    c: Mapping[str, Any], r: _Random, name: str, ratio: int, layer: int
) -> dict[str, Tensor]:
    width, streams = c["hidden_size"], c["hc_mult"]
    heads, dim, rank = c["num_attention_heads"], c["head_dim"], c["q_lora_rank"]
    groups, out = c["o_groups"], c["o_lora_rank"]
    made = {
        "attn_norm.weight": r.norm(width),
        "ffn_norm.weight": r.norm(width),
        "attn.wq_a.weight": r.matrix(rank, width),
        "attn.q_norm.weight": r.norm(rank),
        "attn.wq_b.weight": r.matrix(heads * dim, rank),
        "attn.wkv.weight": r.matrix(dim, width),
        "attn.kv_norm.weight": r.norm(dim),
        "attn.attn_sink": r.normal(heads, scale=0.5),
        "attn.wo_a.weight": r.matrix(groups * out, heads * dim // groups),
        "attn.wo_b.weight": r.matrix(width, groups * out),
    }
    for half in ("attn", "ffn"):
        outputs = (2 + streams) * streams
        made[f"hc_{half}_fn"] = r.matrix(outputs, streams * width)
        made[f"hc_{half}_base"] = r.normal(outputs, scale=0.5)
        made[f"hc_{half}_scale"] = r.uniform(3)
    if ratio:
        rate = c.get("compress_rate_hca", ratio) if ratio == 128 else ratio
        made |= _compressor(r, "attn.compressor", rate, dim, width, ratio == 4)
    if ratio == 4:
        index_heads, index_dim = c["index_n_heads"], c["index_head_dim"]
        made["attn.indexer.wq_b.weight"] = r.matrix(index_heads * index_dim, rank)
        made["attn.indexer.weights_proj.weight"] = r.matrix(index_heads, width)
        made |= _compressor(r, "attn.indexer.compressor", rate, index_dim, width, True)
    made |= _experts(c, r, layer)
    return {f"{name}.{leaf}": tensor for leaf, tensor in made.items()}


def _compressor(
    r: _Random, name: str, rate: int, dim: int, width: int, overlap: bool
) -> dict[str, Tensor]:
    columns = dim * (2 if overlap else 1)
    return {
        f"{name}.ape": r.normal(rate, columns, scale=0.5),
        f"{name}.wkv.weight": r.matrix(columns, width),
        f"{name}.wgate.weight": r.matrix(columns, width),
        f"{name}.norm.weight": r.norm(dim),
    }


def _experts(c: Mapping[str, Any], r: _Random, layer: int) -> dict[str, Tensor]:
    width, inner, count = c["hidden_size"], c["moe_intermediate_size"], c["n_routed_experts"]
    made = {"ffn.gate.weight": r.matrix(count, width)}
    if layer < c["num_hash_layers"]:
        chosen = r.distinct(c["vocab_size"], c["num_experts_per_tok"], count)
        made["ffn.gate.tid2eid"] = chosen
    else:
        made["ffn.gate.bias"] = r.normal(count, scale=0.1)
    for name in (*(f"experts.{e}" for e in range(count)), "shared_experts"):
        # Large enough for the clamp to be felt.
        made[f"ffn.{name}.w1.weight"] = 4 * r.matrix(inner, width)
        made[f"ffn.{name}.w3.weight"] = 4 * r.matrix(inner, width)
        made[f"ffn.{name}.w2.weight"] = r.matrix(width, inner) / 4
    return made


def write(path: Path, stored: Mapping[str, Tensor], config: Mapping[str, Any] = CONFIG) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file(dict(stored), path / "model.safetensors", {"format": "pt"})
    return path


def oracle(path: Path) -> Any:
    """transformers' own model, from the same directory. Raises where a name is not understood."""
    model, report = transformers.DeepseekV4ForCausalLM.from_pretrained(
        path, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    missed = {key: report[key] for key in ("missing_keys", "unexpected_keys") if report[key]}
    if missed:
        raise ValueError(f"transformers reads the checkpoint otherwise: {missed}")
    return model.eval()


def expected_logits(model: Any, token_ids: Tensor) -> Tensor:
    """(T, vocabulary) of one sequence, without a cache."""
    with torch.inference_mode():
        return model(input_ids=token_ids[None], use_cache=False).logits[0].float()


def prompt(length: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 256, (length,), generator=generator)
