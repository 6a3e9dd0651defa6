"""Contract: a stream never shows half a character, and its pieces join to exactly what `decode`
gives, for byte-level, SentencePiece and unknown decoders, whatever tokens come.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_samples import SAMPLES
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from sixfold.common.checkpoint.checkpoint import open_checkpoint
from sixfold.common.checkpoint.detokenize import byte_table
from sixfold.common.checkpoint.source import resolve_model
from sixfold.common.checkpoint.tokenizer import Tokenizer, load_tokenizer


def wrapped(backend: Backend) -> Tokenizer:
    backend.add_special_tokens([AddedToken("<|end|>", special=True, normalized=False)])
    backend.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return Tokenizer(backend, {}, {}, frozenset(), None)


def byte_level() -> Tokenizer:
    """Every byte is a token: characters of several bytes always come in pieces."""
    vocab = byte_table()
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return wrapped(backend)


def byte_fallback(strip: bool) -> Tokenizer:
    """SentencePiece's form: a few letters, everything else as <0x..>."""
    pieces = [*(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "é", "<unk>"]
    vocab = {piece: id for id, piece in enumerate(pieces)}
    model: Any = models.BPE
    backend = Backend(model(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    prepend = [normalizers.Prepend("\u2581")] if strip else []
    backend.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "\u2581")])
    steps: list[Any] = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    return wrapped(backend)


def unknown_decoder() -> Tokenizer:
    """A decoder that is run as it is: word pieces, whose text depends on their neighbours."""
    vocab = {"[UNK]": 0, "un": 1, "##happy": 2, "##ly": 3, "dog": 4, "é": 5, "日本": 6}
    backend = Backend(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return wrapped(backend)


TOKENIZERS = {
    "byte_level": byte_level(),
    "byte_fallback": byte_fallback(strip=False),
    "byte_fallback_strip": byte_fallback(strip=True),
    "smollm2": load_tokenizer(open_checkpoint(resolve_model(""))),
}


def streamed(tokenizer: Tokenizer, ids: list[int], skip: bool = True) -> list[str]:
    stream = tokenizer.stream(skip_special_tokens=skip, start_of_text=True)
    return [*map(stream.step, ids), stream.flush()]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", [s for s in SAMPLES if "\x00" not in s])
def test_text_streams_without_half_characters(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    pieces = streamed(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert pieces[-1] == ""


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_tokens_stream_to_what_decode_gives(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    for skip in (True, False):
        assert "".join(streamed(tokenizer, ids, skip)) == tokenizer.decode(ids, skip)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_decode_equals_the_backend_on_valid_text(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    for text in SAMPLES:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == tokenizer.backend.decode(ids)


def test_a_character_appears_with_its_last_byte() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("日🙂e\u0301")
    expected = ["", "", "日", "", "", "", "🙂", "e", "", "\u0301", ""]
    assert streamed(tokenizer, ids) == expected


def test_an_unfinished_character_is_shown_once_at_the_end() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("a🙂")[:-1]
    assert streamed(tokenizer, ids) == ["a", "", "", "", "\ufffd"]
    assert tokenizer.decode(ids) == "a\ufffd"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_special_tokens_are_skipped_or_shown(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    mark = "<|im_end|>" if name == "smollm2" else "<|end|>"
    end = tokenizer.backend.token_to_id(mark)
    letters = tokenizer.encode("ab")
    ids = [*letters, end, *tokenizer.encode("b")]
    assert mark not in "".join(streamed(tokenizer, ids))
    assert mark in "".join(streamed(tokenizer, ids, skip=False))
    assert tokenizer.token_text(end) == mark
    assert tokenizer.token_bytes(end) == mark.encode()


def test_added_text_tokens_are_always_shown() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("é<tool>é")
    assert len(ids) == 5
    assert "".join(streamed(tokenizer, ids)) == "é<tool>é"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_special_tokens_that_are_wanted_are_shown(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    mark = "<|im_end|>" if name == "smollm2" else "<|end|>"
    end = tokenizer.backend.token_to_id(mark)
    ids = [*tokenizer.encode("ab"), end]
    for shown, there in (((mark, "<|other|>"), True), (("<|other|>",), False)):
        stream = tokenizer.stream(shown=shown)
        text = "".join([*map(stream.step, ids), stream.flush()])
        assert (mark in text) == there


def test_bytes_of_single_tokens() -> None:
    tokenizer = TOKENIZERS["byte_fallback_strip"]
    assert tokenizer.token_bytes(0xE2) == b"\xe2"
    assert tokenizer.token_text(0xE2) == "\ufffd"
    space = tokenizer.backend.token_to_id("\u2581")
    assert tokenizer.token_bytes(space) == b" "
    assert tokenizer.token_bytes(10_000) == b""


def test_an_unknown_decoder_streams_too() -> None:
    tokenizer = unknown_decoder()
    ids = tokenizer.encode("unhappyly dog 日本 é dog")
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids) == "unhappyly dog 日本 é dog"
    assert pieces[1] == "happy"


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 6), max_size=12))
def test_an_unknown_decoder_joins_to_decode(ids: list[int]) -> None:
    tokenizer = unknown_decoder()
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)
