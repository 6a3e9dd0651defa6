"""Texts that break tokenizers, and a GGUF file that holds nothing but a vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

SAMPLES = [
    "Hello world",
    "  two spaces   three\n\n\n\tTabs\t\t end  ",
    "1234567890 3.14159 2024-11-24 ½ ²³ ٣٤٥",
    "I'll, you'RE, he's, they'D; 'tis 'twas don't",
    "def f(x):\r\n    return x**2  # comment\n\n\n",
    "日本語のテキスト、中文字符。한국어",
    "👩\u200d👩\u200d👧\u200d👦 🇫🇷 👍🏽 🙂",
    "é e\u0301 \u0041\u030a ﬁ ǆ",
    "ہیلو دنیا नमस्ते สวัสดี שלום",
    "CamelCase HTTPServer snake_case kebab-case",
    "https://example.org/a?b=c&d=%20#frag",
    "aaaaaaaaaaaaaaaaaaaaaaaaa!!!!!!!!???",
    "\x00\x01\u200b\ufeff\u00a0end",
    "",
    " ",
    "\n",
]
CORPUS = [*SAMPLES, *("the quick brown fox can't jump over 42 lazy dogs' tails",) * 20]


def write_vocabulary(
    path: Path,
    tokens: Sequence[str],
    fields: Mapping[str, Any],
    kinds: Sequence[int] | None = None,
) -> Path:
    """A GGUF file with this vocabulary; `fields` are keys under "tokenizer." (ggml.* or chat_*)."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(8)
    writer.add_context_length(64)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_array("tokenizer.ggml.tokens", list(tokens))
    if kinds is not None:
        writer.add_array("tokenizer.ggml.token_type", list(kinds))
    for key, value in fields.items():
        if isinstance(value, bool):
            writer.add_bool(f"tokenizer.{key}", value)
        elif isinstance(value, str):
            writer.add_string(f"tokenizer.{key}", value)
        elif isinstance(value, int):
            writer.add_uint32(f"tokenizer.{key}", value)
        else:
            writer.add_array(f"tokenizer.{key}", list(value))
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
