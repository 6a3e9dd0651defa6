"""Opens a model on disk: what it is, its configuration, its end tokens. No weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import CheckpointError
from .fields import Fields
from .gguf_config import token_ids, translate
from .gguf_file import open_gguf
from .hf_directory import eos_ids, read_config


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A local model: a Hugging Face directory or a GGUF file.

    `architecture` is the model type of the text model, known to this engine or not. `config` has
    config.json's keys; a GGUF's metadata is translated to them.
    """

    path: Path
    format: Literal["safetensors", "gguf"]
    name: str
    architecture: str
    config: Mapping[str, Any]
    vocab_size: int
    context_length: int
    eos_token_ids: frozenset[int]
    bos_token_id: int | None

    @property
    def config_file(self) -> Path:
        """The file that error messages about the configuration name."""
        return self.path / "config.json" if self.format == "safetensors" else self.path

    @property
    def fields(self) -> Fields:
        return Fields(self.config, self.config_file)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Read what a model is. Raises CheckpointError naming the file and the field."""
    path = Path(path)
    if path.is_dir():
        config = read_config(path)
        return _checkpoint(path, "safetensors", config, eos_ids(path, config))
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or directory.")
    file = open_gguf(path)
    return _checkpoint(path, "gguf", translate(file), token_ids(file)[0])


def _checkpoint(
    path: Path,
    form: Literal["safetensors", "gguf"],
    config: Mapping[str, Any],
    ends: frozenset[int],
) -> Checkpoint:
    fields = Fields(config, path / "config.json" if form == "safetensors" else path)
    vocab_size = fields.positive("vocab_size")
    bos = config.get("bos_token_id")
    return Checkpoint(
        path=path,
        format=form,
        name=_name(path),
        architecture=fields.text("model_type"),
        config=config,
        vocab_size=vocab_size,
        context_length=_context_length(fields),
        eos_token_ids=frozenset(id for id in ends if 0 <= id < vocab_size),
        bos_token_id=bos if isinstance(bos, int) else None,
    )


def _context_length(fields: Fields) -> int:
    length = fields.positive("max_position_embeddings")
    rope = fields.optional("rope_parameters") or fields.optional("rope_scaling") or {}
    if isinstance(rope, dict) and rope.get("rope_type", rope.get("type")) == "yarn":
        # YaRN configurations often keep the length of pre-training in max_position_embeddings.
        original = rope.get("original_max_position_embeddings") or length
        factor = rope.get("factor")
        if isinstance(factor, int | float):
            length = max(length, int(original * factor))
    return length


def _name(path: Path) -> str:
    """The name to serve a model under: repository id, directory name or file stem."""
    absolute = path.absolute()
    if absolute.parent.name == "snapshots" and absolute.parent.parent.name.startswith("models--"):
        return absolute.parent.parent.name.removeprefix("models--").replace("--", "/")
    return absolute.name if absolute.is_dir() else absolute.stem
