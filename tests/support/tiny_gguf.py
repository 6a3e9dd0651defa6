"""Writes tiny GGUF files with the `gguf` package, as llama.cpp's converter lays them out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[np.float32]]

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma3": gguf.MODEL_ARCH.GEMMA3,
}


def write_model(
    path: Path,
    arch: str,
    config: Any,
    state: Arrays,
    kind: Kind = Kind.F32,
    leave_out: Iterable[str] = (),
    extra: Mapping[str, NDArray[Any]] | None = None,
) -> Path:
    """`state` has transformers' names and values. Matrices are stored as `kind`, vectors as F32."""
    writer = gguf.GGUFWriter(path, arch)
    _sizes(writer, arch, config)
    names = gguf.get_tensor_name_map(ARCHITECTURES[arch], config.num_hidden_layers)
    for name, values in state.items():
        if name in leave_out or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        new = names.get_name(name, (".weight", ".bias"))
        if new is None:
            raise KeyError(name)
        values = stored_values(name, values, arch, config)
        if values.ndim == 1:
            writer.add_tensor(new, values)
        else:
            writer.add_tensor(new, gguf.quants.quantize(values, kind), raw_dtype=kind)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def stored_values(
    name: str, values: NDArray[np.float32], arch: str, config: Any
) -> NDArray[np.float32]:
    """What the converter changes: Llama's rotary pairs become neighbours, Gemma's norms 1 + w."""
    if arch == "gemma3" and re.search(r"norm\.weight$", name):
        return values + 1
    found = re.search(r"\.([qk])_proj\.", name)
    if arch != "llama" or not found:
        return values
    heads = config.num_attention_heads if found[1] == "q" else config.num_key_value_heads
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def dequantised(values: NDArray[np.float32], kind: Kind) -> NDArray[np.float32]:
    """The values after a round trip through `kind`, by the gguf package."""
    return gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)


def _sizes(writer: gguf.GGUFWriter, arch: str, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_dim = getattr(config, "head_dim", None)
    if head_dim:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    rope = config.rope_parameters
    if arch == "gemma3":
        writer.add_sliding_window(config.sliding_window)
        writer.add_rope_freq_base(rope["full_attention"]["rope_theta"])
        return
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
