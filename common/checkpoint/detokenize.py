"""Token ids back to text, whole or as a stream, through the bytes that each token stands for.

With byte-level and SentencePiece vocabularies a text's bytes are its tokens' bytes joined; decoding
those incrementally as UTF-8 gives a stream that never shows half a character and whose pieces join
to the full text. Other decoders are run as they are.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from tokenizers import Tokenizer as Backend

_SPACE = "\u2581"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class TextStream(Protocol):
    """Text of one sequence, token by token."""

    def step(self, token_id: int) -> str:
        """The text that became complete; "" while a character is unfinished."""
        ...

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an unfinished character, else ""."""
        ...


def byte_table() -> dict[str, int]:
    """The printable character by which byte-level BPE (GPT-2) spells each byte."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    return {chr(b): b for b in kept} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_LEVEL = byte_table()


def bytes_reader(backend: Backend) -> tuple[Callable[[str], bytes], bool] | None:
    """(vocabulary entry -> bytes, whether a text's leading space is dropped), or None when the
    tokenizer's decoder is neither of the two known kinds."""
    if backend.decoder is None:
        return None
    state = json.loads(backend.decoder.__getstate__())
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level_bytes, False
    replaces = kinds[:1] == ["Replace"] and steps[0]["pattern"] == {"String": _SPACE}
    if replaces and steps[0]["content"] == " " and kinds[1:3] == ["ByteFallback", "Fuse"]:
        rest = steps[3:]
        if not rest:
            return _sentence_piece_bytes, False
        if rest == [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]:
            return _sentence_piece_bytes, True
    return None


def unspelled_bytes(backend: Backend) -> frozenset[int]:
    """Bytes that a byte-level vocabulary has no entry for: its encoder drops them in silence."""
    reader = bytes_reader(backend)
    if reader is None or reader[0] is not _byte_level_bytes:
        return frozenset()
    return frozenset(b for c, b in _BYTE_LEVEL.items() if backend.token_to_id(c) is None)


def _byte_level_bytes(entry: str) -> bytes:
    try:
        return bytes(_BYTE_LEVEL[character] for character in entry)
    except KeyError:  # not spelled in the byte alphabet
        return entry.encode()


def _sentence_piece_bytes(entry: str) -> bytes:
    found = _BYTE.fullmatch(entry)
    return bytes([int(found[1], 16)]) if found else entry.replace(_SPACE, " ").encode()


class ByteStream:
    """A stream over tokens whose bytes are known."""

    def __init__(self, token_bytes: Callable[[int], bytes], strip_space: bool) -> None:
        self._token_bytes = token_bytes
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._strip = strip_space

    def step(self, token_id: int) -> str:
        text = self._decode(self._token_bytes(token_id))
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text

    def flush(self) -> str:
        return self._decode(b"", True)


class WindowStream:
    """A stream over any decoder: decodes the tokens since the last complete text twice, without and
    with the new one, and emits the difference once it does not end in an unfinished character."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._done = 0  # ids whose text was emitted; those before the window are dropped
        self._emitted = ""

    def step(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._decode(self._ids)
        if text.endswith("\ufffd"):
            return ""
        fresh = text[len(self._emitted) :]
        self._ids = self._ids[self._done :]
        self._done = len(self._ids)
        self._emitted = self._decode(self._ids)
        return fresh

    def flush(self) -> str:
        fresh = self._decode(self._ids)[len(self._emitted) :]
        self._ids, self._done, self._emitted = [], 0, ""
        return fresh


def added_contents(backend: Backend) -> tuple[dict[int, str], frozenset[int]]:
    """(id -> literal text of every added token, ids of the special ones)."""
    added: dict[int, Any] = backend.get_added_tokens_decoder()
    return {id: t.content for id, t in added.items()}, frozenset(
        id for id, t in added.items() if t.special
    )
