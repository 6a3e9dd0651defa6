"""A model of Qwen3-0.6B's shape with random weights and the demo model's tokenizer, as one GGUF
file: for speed at a size where kernels matter more than overheads. Its text means nothing.

    python ci/bench/random_model.py /tmp/random-q8_0.gguf [--kind Q8_0]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

from sixfold.common.checkpoint.source import resolve_model

HIDDEN, LAYERS, HEADS, KV_HEADS, DIM, WIDE, VOCABULARY = 1024, 28, 16, 8, 128, 3072, 151936
SPREAD = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--kind", default="Q8_0", help="type of the matrices")
    asked = parser.parse_args()
    kind = Kind[asked.kind]
    writer = gguf.GGUFWriter(asked.path, "qwen3")
    writer.add_file_type(gguf.LlamaFileType["MOSTLY_" + asked.kind])
    writer.add_context_length(40960)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(WIDE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(DIM)
    writer.add_value_length(DIM)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    _tokenizer(writer)
    rng = np.random.default_rng(0)

    def matrix(name: str, rows: int, columns: int) -> None:
        values = rng.standard_normal((rows, columns), np.float32) * SPREAD
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    matrix("token_embd.weight", VOCABULARY, HIDDEN)
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        for norm, width in (("attn", HIDDEN), ("ffn", HIDDEN), ("attn_q", DIM), ("attn_k", DIM)):
            writer.add_tensor(f"{block}{norm}_norm.weight", np.ones(width, np.float32))
        matrix(f"{block}attn_q.weight", HEADS * DIM, HIDDEN)
        matrix(f"{block}attn_k.weight", KV_HEADS * DIM, HIDDEN)
        matrix(f"{block}attn_v.weight", KV_HEADS * DIM, HIDDEN)
        matrix(f"{block}attn_output.weight", HIDDEN, HEADS * DIM)
        matrix(f"{block}ffn_gate.weight", WIDE, HIDDEN)
        matrix(f"{block}ffn_up.weight", WIDE, HIDDEN)
        matrix(f"{block}ffn_down.weight", HIDDEN, WIDE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tokenizer(writer: gguf.GGUFWriter) -> None:
    """The demo model's, filled up with unused tokens."""
    fields = gguf.GGUFReader(resolve_model("")).fields

    def strings(key: str) -> list[str]:
        field = fields[f"tokenizer.ggml.{key}"]
        return [bytes(field.parts[i]).decode("utf-8") for i in field.data]

    def number(key: str) -> int:
        return int(fields[f"tokenizer.ggml.{key}"].parts[-1][0])

    tokens = strings("tokens")
    kinds = [int(fields["tokenizer.ggml.token_type"].parts[i][0])
             for i in fields["tokenizer.ggml.token_type"].data]  # fmt: skip
    unused = VOCABULARY - len(tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens + [f"<|unused_{i}|>" for i in range(unused)])
    writer.add_token_types(kinds + [gguf.TokenType.UNUSED] * unused)
    writer.add_token_merges(strings("merges"))
    writer.add_chat_template(bytes(fields["tokenizer.chat_template"].parts[-1]).decode("utf-8"))
    writer.add_eos_token_id(number("eos_token_id"))
    writer.add_bos_token_id(number("bos_token_id"))


if __name__ == "__main__":
    main()
