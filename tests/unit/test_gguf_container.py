"""Contract: `GGUFFile` reads what the `gguf` package writes, refuses damaged files with one
sentence and never fails in another way; block types convert exactly as by the package.
"""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st

from sixfold.common.checkpoint.checkpoint import open_checkpoint
from sixfold.common.checkpoint.gguf_file import GGUFFile
from sixfold.common.checkpoint.gguf_types import SUPPORTED, supported_names
from sixfold.common.checkpoint.gguf_weights import GGUFWeights
from sixfold.common.errors import CheckpointError

# Where each block type keeps fp16 numbers; random bits there could be infinite.
HALVES = {
    "F16": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0],
    "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
}  # fmt: skip
BLOCKS = {Kind(number): block for number, block in SUPPORTED.items()}


def random_blocks(kind: Kind, count: int, seed: int = 0) -> np.ndarray:
    """Valid raw blocks with every bit pattern but infinities."""
    rng = np.random.default_rng(seed)
    block = BLOCKS[kind]
    raw = rng.integers(0, 256, (count, block.nbytes), dtype=np.uint8)
    if kind in (Kind.F32, Kind.BF16):
        values = rng.normal(size=count).astype(np.float32)
        return gguf.quants.quantize(values[None], kind).view(np.uint8).reshape(count, -1)
    for at in HALVES[block.name]:
        halves = rng.normal(size=count).astype(np.float16)
        raw[:, at : at + 2] = halves[:, None].view(np.uint8)
    return raw


def write(path: Path, tensors: dict[str, tuple[np.ndarray, Kind]], **fields: object) -> Path:
    writer = gguf.GGUFWriter(path, str(fields.pop("arch", "llama")))
    for name, value in fields.items():
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        else:
            writer.add_uint32(name, value)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_conversion_is_bit_equal_to_the_package(kind: Kind) -> None:
    block = BLOCKS[kind]
    count = 300 if block.elements > 1 else 3000
    raw = random_blocks(kind, count)
    expected = gguf.quants.dequantize(raw, kind)
    out = np.empty((count, block.elements), np.float32)
    block.convert(raw, out)
    assert np.isfinite(expected).all()
    assert np.array_equal(out.ravel(), np.asarray(expected).ravel())


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_rows_read_in_pieces_equal_the_whole(kind: Kind, tmp_path: Path) -> None:
    rows, columns, block = 37, 512, BLOCKS[kind]
    raw = random_blocks(kind, rows * columns // block.elements).reshape(rows, -1)
    path = write(tmp_path / "m.gguf", {"token_embd.weight": (raw, kind)}, arch="qwen2")
    weights = GGUFWeights(path)
    name = "model.embed_tokens.weight"
    assert list(weights.names()) == [name]
    assert weights.shape(name) == (rows, columns)
    whole = weights.read_rows(name, 0, rows)
    expected = gguf.quants.dequantize(raw.reshape(-1, block.nbytes), kind)
    assert np.array_equal(whole.ravel(), np.asarray(expected).ravel())
    pieces = [weights.read_rows(name, a, b) for a, b in ((0, 1), (1, 20), (20, 20), (20, 37))]
    assert np.array_equal(np.concatenate(pieces), whole)


def test_llama_heads_are_put_back_in_halves(tmp_path: Path) -> None:
    """Rows 2i and 2i+1 of a head are the partners i and i + dim/2; in pieces of whole heads too."""
    heads, dim = 3, 4
    stored = np.arange(heads * dim, dtype=np.float32)[:, None].repeat(2, 1)
    tensors = {
        "blk.0.attn_q.weight": (stored, Kind.F32),
        "blk.0.attn_q.bias": (stored[:, 0], Kind.F32),
    }
    path = write(tmp_path / "m.gguf", tensors, **{"llama.attention.head_count": heads})
    weights = GGUFWeights(path)
    name = "model.layers.0.self_attn.q_proj.weight"
    expected = [0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11]
    assert weights.row_step(name) == dim
    assert weights.read_rows(name, 0, 12)[:, 0].tolist() == expected
    assert weights.read_rows(name, 4, 12)[:, 1].tolist() == expected[4:]
    bias = "model.layers.0.self_attn.q_proj.bias"
    assert weights.read_rows(bias, 0, 1)[0].tolist() == expected


def test_metadata_of_every_type(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -3)
    writer.add_uint16("u16", 60000)
    writer.add_int16("i16", -300)
    writer.add_uint32("u32", 4_000_000_000)
    writer.add_int32("i32", -70000)
    writer.add_uint64("u64", 2**63 + 5)
    writer.add_int64("i64", -(2**40))
    writer.add_float32("f32", 0.5)
    writer.add_float64("f64", 1e300)
    writer.add_bool("yes", True)
    writer.add_string("text", "naïve 日本 🙂")
    writer.add_array("words", ["a", "", "日本", "x" * 300])
    writer.add_array("numbers", [1, -2, 3])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(path)
    scalars = dict(file.scalars())
    assert scalars == {
        "general.architecture": "llama", "u8": 200, "i8": -3, "u16": 60000, "i16": -300,
        "u32": 4_000_000_000, "i32": -70000, "u64": 2**63 + 5, "i64": -(2**40), "f32": 0.5,
        "f64": 1e300, "yes": True, "text": "naïve 日本 🙂",
    }  # fmt: skip
    assert file.get("words") == ["a", "", "日本", "x" * 300]
    assert file.get("numbers").tolist() == [1, -2, 3]
    assert file.strings("words") == ["a", "", "日本", "x" * 300]
    assert file.strings("absent") == []
    assert file.numbers("absent", 3) is None
    for read in (lambda: file.strings("numbers"), lambda: file.numbers("numbers", 4)):
        with pytest.raises(CheckpointError, match="'numbers'"):
            read()
    assert file.get("absent", 7) == 7
    assert "yes" in file
    assert "absent" not in file


def small_file(path: Path) -> Path:
    rows = np.arange(64, dtype=np.float32).reshape(2, 32)
    tensors = {"token_embd.weight": (rows, Kind.F32), "output_norm.weight": (rows[0], Kind.F32)}
    fields: dict[str, object] = {
        "tokenizer.ggml.tokens": ["one", "two"],
        "tokenizer.ggml.token_type": [1, 3],
        "tokenizer.ggml.eos_token_id": 1,
        "llama.block_count": 1,
        "llama.context_length": 64,
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 8,
        "llama.attention.head_count": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }
    return write(path, tensors, **fields)


def test_every_truncation_is_a_checkpoint_error(tmp_path: Path) -> None:
    whole = small_file(tmp_path / "whole.gguf").read_bytes()
    end = max(t.offset + t.nbytes for t in GGUFFile(tmp_path / "whole.gguf").tensors.values())
    path = tmp_path / "cut.gguf"
    for length in range(end):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut\.gguf.*\.$"):
            GGUFFile(path)
    path.write_bytes(whole[:end])
    GGUFFile(path)


@settings(max_examples=500, deadline=None)
@given(place=st.integers(4, 700), value=st.integers(0, 255))
def test_a_wrong_byte_is_read_or_refused(
    place: int, value: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp()
    source = folder / "good.gguf"
    if not source.exists():
        open_checkpoint(small_file(source))  # whole, it is accepted
    data = bytearray(source.read_bytes())
    data[place % len(data)] = value
    path = folder / "flipped.gguf"
    path.write_bytes(data)
    with contextlib.suppress(CheckpointError):
        open_checkpoint(path)
        GGUFFile(path).get("tokenizer.ggml.tokens")


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        GGUFFile(path)
    return str(caught.value)


def test_truncated_weights_name_the_tensor(tmp_path: Path) -> None:
    path = small_file(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[:-40])
    text = refusal(path)
    assert "output_norm.weight" in text
    assert str(path) in text


def test_unsupported_type_lists_the_supported(tmp_path: Path) -> None:
    raw = np.zeros((2, 136), np.uint8)
    path = write(tmp_path / "m.gguf", {"blk.0.ffn_up.weight": (raw, Kind.IQ4_XS)})
    text = refusal(path)
    assert "blk.0.ffn_up.weight" in text
    assert "IQ4_XS" in text
    assert "F32 F16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q4_K Q5_K Q6_K BF16" in text
    assert supported_names() in text


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "empty"),
        (b"PK\x03\x04 a zip file", "not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "little-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "cut short"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**62), "cut short"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 77), "metadata type 77"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 9, 1), "damaged"),
    ],
)
def test_what_is_no_gguf_file(data: bytes, word: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    text = refusal(path)
    assert str(path) in text
    assert word in text


def test_absent_file(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "absent.gguf")
