"""The weights of a GGUF file under their Hugging Face names, converted to float32 by rows.

Nothing is kept: each call reads the asked rows from the file, so that the memory of the stored form
never adds to that of the loaded model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import CheckpointError
from .gguf_blocks import SCHEMES, take_apart
from .gguf_file import GGUFTensor, open_gguf
from .gguf_types import SUPPORTED
from .quantised_rows import QuantisedRows

_OUTSIDE_BLOCKS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_IN_BLOCKS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA3 = _IN_BLOCKS | {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_FLOATS = {"F16": "float16", "BF16": "bfloat16"}
_NOT_WEIGHTS = {"rope_freqs.weight"}  # read with the configuration


class GGUFWeights:
    """Row access to the tensors of one file.

    `norm_offset` is what stored norm weights already include: Gemma's files hold 1 + w.
    """

    def __init__(self, path: Path) -> None:
        file = open_gguf(path)
        self.path = path
        arch = file.get("general.architecture", "")
        self.norm_offset = 1.0 if arch == "gemma3" else 0.0
        table = _GEMMA3 if arch == "gemma3" else _IN_BLOCKS
        self._tensors: dict[str, GGUFTensor] = {}
        for tensor in file.tensors.values():
            if tensor.name not in _NOT_WEIGHTS:
                self._tensors[_hugging_face_name(tensor.name, table, path)] = tensor
        heads = int(file.get(f"{arch}.attention.head_count", 1))
        kv_heads = int(file.get(f"{arch}.attention.head_count_kv", heads))
        self._interleaved = {"q_proj": heads, "k_proj": kv_heads} if arch == "llama" else {}

    def names(self) -> Sequence[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def stored_name(self, name: str) -> str:
        return self._tensors[name].name

    def row_step(self, name: str) -> int:
        """`read_rows` must begin and end on multiples of this many rows (or at the last row)."""
        heads = self._heads(name)
        shape = self._tensors[name].shape
        return shape[0] // heads if heads and len(shape) > 1 else 1

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows start..stop of the tensor as (rows, columns); a vector is one row. A fresh array."""
        tensor = self._tensors[name]
        columns = tensor.shape[-1]
        block = SUPPORTED[tensor.kind]
        raw = self._read(tensor, start, stop)
        out = np.empty((stop - start, columns), np.float32)
        block.convert(raw.reshape(-1, block.nbytes), out.reshape(-1, block.elements))
        heads = self._heads(name)
        if not heads:
            return out
        if len(tensor.shape) == 1:
            return _halves(out.reshape(-1, 1), heads).reshape(1, -1)
        return _halves(out, len(out) // self.row_step(name))

    def scheme(self, name: str) -> str:
        """The type of a matrix: one of gguf_blocks.SCHEMES, "float16" or "bfloat16"; "" for float32
        and for vectors."""
        tensor = self._tensors[name]
        kind = SUPPORTED[tensor.kind].name
        known = kind.lower() if kind.lower() in SCHEMES else _FLOATS.get(kind, "")
        return known if len(tensor.shape) == 2 else ""

    def quantised_rows(self, name: str) -> QuantisedRows:
        """The whole matrix in its stored precision; rows in Hugging Face's order."""
        tensor = self._tensors[name]
        rows = tensor.shape[0]
        found = take_apart(SUPPORTED[tensor.kind], self._read(tensor, 0, rows), rows)
        heads = self._heads(name)
        if not heads:
            return found
        order = _halves(np.arange(rows, dtype=np.float32)[:, None], heads)[:, 0].astype(np.intp)
        minimum = None if found.minimum is None else found.minimum[order]
        return replace(found, q=found.q[order], scale=found.scale[order], minimum=minimum)

    def _read(self, tensor: GGUFTensor, start: int, stop: int) -> NDArray[np.uint8]:
        """The bytes of rows start..stop."""
        block = SUPPORTED[tensor.kind]
        row_bytes = tensor.shape[-1] // block.elements * block.nbytes
        raw = np.empty((stop - start) * row_bytes, np.uint8)
        with self.path.open("rb", buffering=0) as file:
            file.seek(tensor.offset + start * row_bytes)
            if file.readinto(raw.data) != raw.nbytes:
                raise CheckpointError(f"{self.path}: the file ends inside {tensor.name!r}.")
        return raw

    def _heads(self, name: str) -> int:
        """Heads of a tensor whose rotary pairs are stored next to each other, else 0."""
        return self._interleaved.get(name.split(".")[-2], 0)


def _halves(rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rotary pairs (2i, 2i+1) of each head back to (i, i + dim/2)."""
    pairs = rows.reshape(heads, -1, 2, rows.shape[-1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def _hugging_face_name(name: str, table: dict[str, str], path: Path) -> str:
    found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if found:
        layer, part, suffix = found.groups()
        if layer is None and part in _OUTSIDE_BLOCKS:
            return f"{_OUTSIDE_BLOCKS[part]}.{suffix}"
        if layer is not None and part in table:
            return f"model.layers.{layer}.{table[part]}.{suffix}"
    raise CheckpointError(
        f"{path}: tensor {name!r} is not part of a supported architecture; the file needs a "
        "newer version or a different engine."
    )
