"""Guards the cache of packed matrices: what was put comes back bit for bit on mapped pages; a file
that is cut, of another key or not ours is as if absent; a folder that cannot be written says so."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from sixfold.models.matrix_cache import FOLDER, MatrixCache, Parts, fingerprint, user_folder
from sixfold.models.stale_matrices import Origin, origin_of

KEY = "0123"
ORIGIN = Origin("/models/one", "now")
MATRICES = {
    "model.a": Parts(
        {"format": 4, "shape": [3, 5]},
        {
            "data": torch.arange(30, dtype=torch.uint8).view(5, 3, 2),
            "scales": torch.randn(7).half(),
            "none": torch.empty(0, 4),
        },
    ),
    "model.a.b": Parts({}, {"data": torch.randn(4, 4).bfloat16(), "order": torch.arange(3)}),
}


def filled(folder: Path) -> Path:
    cache = MatrixCache(folder / FOLDER, KEY, ORIGIN)
    assert not cache.found
    assert cache.get("model.a") is None
    for name, parts in MATRICES.items():
        cache.put(name, parts)
    assert cache.save() == ""
    return cache.path


def test_what_was_put_comes_back(tmp_path: Path) -> None:
    path = filled(tmp_path)
    assert path.parent == tmp_path / FOLDER
    assert [p.name for p in path.parent.iterdir()] == [path.name], "nothing else is left behind"
    cache = MatrixCache(tmp_path / FOLDER, KEY, ORIGIN)
    assert cache.found
    for name, parts in MATRICES.items():
        found = cache.get(name)
        assert found is not None
        assert found.facts == parts.facts
        assert list(found.tensors) == list(parts.tensors)
        for part, tensor in parts.tensors.items():
            assert found.tensors[part].dtype == tensor.dtype
            assert torch.equal(found.tensors[part], tensor)
    assert cache.get("model") is None


def test_the_file_is_safetensors(tmp_path: Path) -> None:
    from safetensors import safe_open

    with safe_open(filled(tmp_path), "pt") as file:
        assert file.metadata()["key"] == KEY
        assert torch.equal(file.get_tensor("model.a/data"), MATRICES["model.a"].tensors["data"])


def test_changing_a_mapped_matrix_leaves_the_file(tmp_path: Path) -> None:
    filled(tmp_path)
    first = MatrixCache(tmp_path / FOLDER, KEY, ORIGIN).get("model.a")
    assert first is not None
    first.tensors["data"].zero_()
    again = MatrixCache(tmp_path / FOLDER, KEY, ORIGIN).get("model.a")
    assert again is not None
    assert torch.equal(again.tensors["data"], MATRICES["model.a"].tensors["data"])


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:-1],
        lambda raw: raw + b"\0",
        lambda raw: raw[:40],
        lambda raw: b"",
        lambda raw: b"\xff" * len(raw),
        lambda raw: raw.replace(KEY.encode(), b"9999"),
        lambda raw: raw.replace(b"data_offsets", b"data_offsits"),
    ],
)
def test_a_damaged_file_is_as_if_absent(tmp_path: Path, damage) -> None:
    path = filled(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    assert not MatrixCache(tmp_path / FOLDER, KEY, ORIGIN).found
    assert filled(tmp_path) == path, "and is replaced"
    assert MatrixCache(tmp_path / FOLDER, KEY, ORIGIN).found


def test_half_a_file_of_an_earlier_start_is_removed(tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    left, written_now = (tmp_path / FOLDER / name for name in ("left.part", "now.part"))
    left.write_bytes(b"half")
    os.utime(left, (1, 1))
    written_now.write_bytes(b"half")
    path = filled(tmp_path)
    assert set(path.parent.iterdir()) == {path, written_now}


def test_a_folder_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / FOLDER).write_text("a file is in the way")
    cache = MatrixCache(tmp_path / FOLDER, KEY, ORIGIN)
    cache.put("a", MATRICES["model.a"])
    assert "exists" in cache.save().lower()


def test_the_key_follows_files_and_settings(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"one")
    keys = {fingerprint([file], {"quantize": "int8"}), fingerprint([file], {"quantize": "int4"})}
    assert fingerprint([file], {"quantize": "int8"}) in keys
    os.utime(file, ns=(1, 1))
    keys.add(fingerprint([file], {"quantize": "int8"}))
    file.write_bytes(b"three")
    keys.add(fingerprint([file], {"quantize": "int8"}))
    assert len(keys) == 4


def saved(folder: Path, key: str, origin: Origin) -> Path:
    cache = MatrixCache(folder, key, origin)
    cache.put("model.a", MATRICES["model.a"])
    assert cache.save() == ""
    return cache.path


def test_what_the_checkpoint_was_before_is_deleted(tmp_path: Path) -> None:
    before = saved(tmp_path, "a", Origin("/models/one", "before"))
    mapped = MatrixCache(tmp_path, "a", Origin("/models/one", "before"))
    other_settings = saved(tmp_path, "b", ORIGIN)
    other_model = saved(tmp_path, "c", Origin("/models/two", "before"))
    assert not before.exists()
    writing, foreign = tmp_path / "x.part", tmp_path / "theirs.safetensors"
    writing.write_bytes(b"half")
    foreign.write_bytes((2).to_bytes(8, "little") + b"{}")
    now = saved(tmp_path, "d", ORIGIN)
    assert set(tmp_path.iterdir()) == {other_settings, other_model, now, writing, foreign}
    found = mapped.get("model.a")
    assert found is not None
    assert torch.equal(found.tensors["data"], MATRICES["model.a"].tensors["data"])


def test_a_file_that_does_not_say_whose_it_is_goes(tmp_path: Path) -> None:
    """As versions before the origin was written left them."""
    text = b'{"__metadata__": {"key": "9", "facts": "{}"}}'
    (tmp_path / "9.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    assert list(tmp_path.iterdir()) != [saved(tmp_path, "d", ORIGIN)]
    assert [path.name for path in tmp_path.iterdir()] == ["d.safetensors"]


def test_a_state_is_the_files_and_the_version(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"1")
    first = origin_of(file, [file], 1)
    assert origin_of(file, [file], 1) == first
    assert origin_of(file, [file], 2).state != first.state
    file.write_bytes(b"12")
    assert origin_of(file, [file], 1).state != first.state
    assert origin_of(file, [file], 1).checkpoint == first.checkpoint


def test_tests_leave_the_users_cache_alone() -> None:
    """Here, and in the processes that tests start."""
    assert user_folder().is_relative_to(tempfile.gettempdir())
    program = "from sixfold.models.matrix_cache import user_folder; print(user_folder())"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.strip() == str(user_folder())
