"""A model's tokenizer: text to ids, ids to text (whole or streamed), chat template."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from ..errors import CheckpointError, RequestError
from . import gguf_tokenizer
from .built_in_templates import BUILT_IN
from .chat_template import ChatTemplate, Messages
from .checkpoint import Checkpoint
from .detokenize import (
    ByteStream,
    TextStream,
    WindowStream,
    added_contents,
    bytes_reader,
    unspelled_bytes,
)
from .gguf_file import GGUFFile, open_gguf
from .hf_directory import read_object, token_content


class Tokenizer:
    """Wraps a `tokenizers.Tokenizer`. Safe to use from several threads; streams are not shared."""

    def __init__(
        self,
        backend: Backend,
        templates: Mapping[str, str],
        special_texts: Mapping[str, str],
        eos_token_ids: frozenset[int],
        bos_token_id: int | None,
    ) -> None:
        backend.no_truncation()  # some files cut long texts: nothing is cut here
        backend.no_padding()
        self.backend = backend
        self.eos_token_ids = eos_token_ids
        self.bos_token_id = bos_token_id
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self._template = ChatTemplate(templates, special_texts)
        self._added, self._special = added_contents(backend)
        reader = bytes_reader(backend)
        self._entry_bytes = reader[0] if reader else None
        self._strips_space = reader is not None and reader[1]
        self._unspelled = unspelled_bytes(backend)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text. `add_special_tokens` adds what the model wants around a plain text (BOS);
        a rendered chat template already holds it, so pass False for one. Raises RequestError for a
        character that the vocabulary cannot spell: nothing of a prompt is dropped."""
        if self._unspelled:
            self._refuse_unspelled(text)
        return list(self.backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def _refuse_unspelled(self, text: str) -> None:
        if self._unspelled.isdisjoint(text.encode("utf-8", "surrogatepass")):
            return
        odd = next(c for c in text if not self._unspelled.isdisjoint(c.encode("utf-8", "replace")))
        raise RequestError(
            f"This model's vocabulary cannot spell the character U+{ord(odd):04X}; "
            "leave it out of the text.",
            code="unspellable_character",
        )

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence; bytes that are no UTF-8 become U+FFFD."""
        if self._entry_bytes is None:
            return str(self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens))
        kept = (i for i in ids if not (skip_special_tokens and i in self._special))
        text = b"".join(map(self.token_bytes, kept)).decode("utf-8", "replace")
        return text.removeprefix(" ") if self._strips_space else text

    def stream(
        self,
        skip_special_tokens: bool = True,
        start_of_text: bool = False,
        shown: Collection[str] = (),
    ) -> TextStream:
        """A decoder for tokens as they come. It continues a text, so it keeps the leading space
        that `decode` drops for some vocabularies; `start_of_text=True` makes the pieces join to
        exactly what `decode` gives. Special tokens with a text in `shown` are not skipped."""
        skipped = {t for t in self._special if self._added[t] not in shown}
        if self._entry_bytes is None:
            skip = skip_special_tokens and skipped == self._special
            return WindowStream(lambda ids: self.decode(ids, skip))

        def kept(token_id: int) -> bytes:
            skip = skip_special_tokens and token_id in skipped
            return b"" if skip else self.token_bytes(token_id)

        return ByteStream(kept, strip_space=self._strips_space and start_of_text)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for; special tokens as written, unknown ids empty."""
        if token_id in self._added:
            return self._added[token_id].encode()
        if self._entry_bytes is None:
            return self.backend.decode([token_id], skip_special_tokens=False).encode()
        entry = self.backend.id_to_token(token_id)
        return b"" if entry is None else self._entry_bytes(entry)

    def token_text(self, token_id: int) -> str:
        """One token as text; half characters show as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    @property
    def chat_template(self) -> str | None:
        """The template's source, or None when the model has none."""
        return self._template.default

    def use_chat_template(self, source: str) -> None:
        """Replace the model's own template by the user's. Raises CheckpointError."""
        self._template.replace(source)

    def apply_chat_template(
        self, messages: Messages, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt for a conversation, as text. Raises RequestError."""
        return self._template.render(messages, add_generation_prompt, **variables)


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The checkpoint's tokenizer. Raises CheckpointError naming the file."""
    if checkpoint.format == "gguf":
        file = open_gguf(checkpoint.path)
        return Tokenizer(
            gguf_tokenizer.build(file),
            _gguf_templates(file),
            gguf_tokenizer.special_texts(file),
            checkpoint.eos_token_ids,
            checkpoint.bos_token_id,
        )
    directory = checkpoint.path
    backend = _read_backend(directory)
    config = read_object(directory / "tokenizer_config.json") or {}
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    texts = {name: token_content(config.get(name)) for name in names}
    bos = checkpoint.bos_token_id
    if bos is None and texts["bos_token"] is not None:
        bos = backend.token_to_id(texts["bos_token"])
    return Tokenizer(
        backend,
        _directory_templates(directory, config) or _built_in(checkpoint.architecture),
        {name: text for name, text in texts.items() if text is not None},
        checkpoint.eos_token_ids,
        bos,
    )


def _read_backend(directory: Path) -> Backend:
    path = directory / "tokenizer.json"
    if path.is_file():
        try:
            return Backend.from_file(str(path))
        except Exception as error:  # the Rust side raises a bare Exception
            raise CheckpointError(f"{path}: not a valid tokenizer ({error}).") from None
    return _convert(directory)


def _convert(directory: Path) -> Backend:
    """A directory with an older tokenizer only (tokenizer.model, vocab.json): let transformers
    convert it."""
    missing = CheckpointError(
        f"{directory}: no tokenizer.json, and no other tokenizer there could be converted to it; "
        "save one with `AutoTokenizer.from_pretrained(…).save_pretrained(…)`."
    )
    if not any((directory / n).is_file() for n in ("tokenizer.model", "vocab.json", "tekken.json")):
        raise missing
    try:
        from transformers import AutoTokenizer

        converted: Any = AutoTokenizer.from_pretrained(str(directory), use_fast=True)
    except Exception as error:  # a missing package or an unreadable file: one sentence either way
        raise CheckpointError(f"{missing} ({str(error).strip().splitlines()[0]})") from None
    backend = getattr(converted, "backend_tokenizer", None)
    if not isinstance(backend, Backend):
        raise missing
    return backend


def _directory_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    jinja = directory / "chat_template.jinja"
    if jinja.is_file():
        return {"default": jinja.read_text("utf-8")}
    separate = read_object(directory / "chat_template.json") or {}
    found = separate.get("chat_template", config.get("chat_template"))
    if isinstance(found, str):
        return {"default": found}
    if isinstance(found, list):
        return {t["name"]: t["template"] for t in found if {"name", "template"} <= set(t)}
    return {}


def _built_in(architecture: str) -> dict[str, str]:
    template = BUILT_IN.get(architecture)
    return {} if template is None else {"default": template}


def _gguf_templates(file: GGUFFile) -> dict[str, str]:
    prefix = "tokenizer.chat_template"
    names = file.get("tokenizer.chat_templates", [])
    found = {"default": file.get(prefix)} | {n: file.get(f"{prefix}.{n}") for n in names}
    return {name: text for name, text in found.items() if isinstance(text, str)}
