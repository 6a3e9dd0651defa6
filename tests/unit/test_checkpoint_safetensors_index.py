"""Contract: `read_tables` finds every tensor of a directory's safetensors files and refuses
incomplete or damaged ones, naming file and tensor. Torch is not needed.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from sixfold.common.checkpoint.safetensors_index import read_header, read_tables
from sixfold.common.errors import CheckpointError


def sharded(path: Path) -> Path:
    first = {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}
    second = {"b": np.ones(4, np.float16), "c": np.zeros((0, 3), np.float32)}
    save_file(first, path / "model-1.safetensors")
    save_file(second, path / "model-2.safetensors")
    places = {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-2.safetensors"}
    index = {"metadata": {}, "weight_map": places}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_tables(path)
    text = str(caught.value)
    assert text.endswith(".")
    assert str(path) in text
    return text


def test_shards(tmp_path: Path) -> None:
    tables = read_tables(sharded(tmp_path))
    assert {name: (t.dtype, t.shape) for name, t in tables.items()} == {
        "a": ("F32", (2, 3)),
        "b": ("F16", (4,)),
        "c": ("F32", (0, 3)),
    }
    a = tables["a"]
    raw = a.file.read_bytes()[a.offset : a.offset + a.nbytes]
    assert np.frombuffer(raw, "<f4").tolist() == [0, 1, 2, 3, 4, 5]


def test_single_file_and_files_without_an_index(tmp_path: Path) -> None:
    save_file({"x": np.ones(2, np.float32)}, tmp_path / "weights.safetensors")
    save_file({"y": np.ones(2, np.float32)}, tmp_path / "more.safetensors")
    assert set(read_tables(tmp_path)) == {"x", "y"}
    save_file({"z": np.ones(2, np.float32)}, tmp_path / "model.safetensors")
    assert set(read_tables(tmp_path)) == {"z"}


def test_missing_shard(tmp_path: Path) -> None:
    (sharded(tmp_path) / "model-2.safetensors").unlink()
    assert "model-2.safetensors" in refusal(tmp_path)


def test_tensor_that_its_shard_lacks(tmp_path: Path) -> None:
    save_file({"other": np.ones(2, np.float32)}, sharded(tmp_path) / "model-1.safetensors")
    text = refusal(tmp_path)
    assert "'a'" in text
    assert "model-1.safetensors" in text


@pytest.mark.parametrize("index", ["{}", '{"weight_map": 3}', "[", "[]"])
def test_broken_index(index: str, tmp_path: Path) -> None:
    (sharded(tmp_path) / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json" in refusal(tmp_path)


def test_every_truncation(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": np.ones(5, np.float32), "b": np.ones(3, np.float32)}, path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert "model.safetensors" in refusal(tmp_path)
    path.write_bytes(whole)
    assert set(read_header(path)) == {"a", "b"}


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[]",
        b'{"a": {"dtype": "F32", "shape": [2]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}',
        b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": "no", "data_offsets": [0, 8]}}',
        b'{"a": 7}',
    ],
)
def test_damaged_header(header: bytes, tmp_path: Path) -> None:
    data = struct.pack("<Q", len(header)) + header + bytes(8)
    (tmp_path / "model.safetensors").write_bytes(data)
    assert "damaged" in refusal(tmp_path)


def test_no_safetensors(tmp_path: Path) -> None:
    assert "no *.safetensors" in refusal(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert "pytorch_model.bin is a pickle" in refusal(tmp_path)
