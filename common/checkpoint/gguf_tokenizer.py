"""Builds a `tokenizers.Tokenizer` from the vocabulary in a GGUF file's metadata.

Two kinds exist: byte-level BPE ("gpt2", with a named pre-tokenizer) and SentencePiece ("llama",
scores instead of merges, byte fallback).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from ..errors import CheckpointError
from .gguf_config import CONTROL
from .gguf_file import GGUFFile

_NORMAL, _UNKNOWN, _USER_DEFINED = 1, 2, 4
_SPACE = "\u2581"  # SentencePiece's visible space

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_TAIL}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class _Split:
    """How text is cut before byte-level BPE."""

    pattern: str = ""  # "" = GPT-2's own pattern
    single_digits: bool = False
    nfc: bool = False
    whole_words: bool = False  # a piece that is in the vocabulary is taken without merging
    bos: bool = False  # BOS is added unless the file says otherwise


_GPT2 = _Split()
_LLAMA_BPE = _Split(_LLAMA3, whole_words=True, bos=True)
_SPLITS = {
    "gpt-2": _GPT2,
    "smollm": _Split(single_digits=True),
    "qwen2": _Split(_QWEN2, nfc=True),
    "llama-bpe": _LLAMA_BPE,
    "llama3": _LLAMA_BPE,
    "llama-v3": _LLAMA_BPE,
    "tekken": _Split(_TEKKEN, whole_words=True, bos=True),
}


def build(file: GGUFFile) -> Tokenizer:
    """The tokenizer described by the file. Raises CheckpointError naming the field."""
    tokens = file.strings("tokenizer.ggml.tokens")
    if not tokens:
        raise CheckpointError(
            f"{file.path}: field 'tokenizer.ggml.tokens' is missing: no tokenizer."
        )
    kind = file.get("tokenizer.ggml.model")
    kinds = file.numbers("tokenizer.ggml.token_type", len(tokens))
    types: list[int] = [_NORMAL] * len(tokens) if kinds is None else kinds.tolist()
    if kind == "gpt2":
        tokenizer, default_bos = _byte_level(file, tokens), _split(file).bos
    elif kind == "llama":
        tokenizer, default_bos = _sentence_piece(file, tokens, types), True
    else:
        raise CheckpointError(
            f"{file.path}: field 'tokenizer.ggml.model' is {kind!r}, which is not supported; "
            "supported: gpt2 llama."
        )
    _add_special(tokenizer, tokens, types)
    _add_template(tokenizer, file, tokens, default_bos)
    return tokenizer


def special_texts(file: GGUFFile) -> dict[str, str]:
    """Text of bos, eos, unk and pad tokens, by the names that chat templates use."""
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    tokens = file.strings("tokenizer.ggml.tokens")
    texts = {name: _special(file, tokens, key) for key, name in names.items()}
    return {name: text[0] for name, text in texts.items() if text is not None}


def _special(file: GGUFFile, tokens: list[str], key: str) -> tuple[str, int] | None:
    """(text, id) of a special token, or None when the file has none."""
    name = f"tokenizer.ggml.{key}_token_id"
    id = file.get(name)
    if id is None:
        return None
    if not isinstance(id, int) or not 0 <= id < len(tokens):
        raise CheckpointError(
            f"{file.path}: field {name!r} is {id!r}, not one of the {len(tokens)} tokens."
        )
    return tokens[id], id


def _split(file: GGUFFile) -> _Split:
    name = file.get("tokenizer.ggml.pre")
    if name not in _SPLITS:
        raise CheckpointError(
            f"{file.path}: field 'tokenizer.ggml.pre' is {name!r}, which is not supported (a wrong "
            f"guess would change the tokens); supported: {' '.join(sorted(_SPLITS))}."
        )
    return _SPLITS[name]


def _byte_level(file: GGUFFile, tokens: list[str]) -> Tokenizer:
    split = _split(file)
    vocab = {text: id for id, text in enumerate(tokens)}
    merges = [tuple(line.split(" ", 1)) for line in file.strings("tokenizer.ggml.merges")]
    model: Any = BPE
    try:
        tokenizer = Tokenizer(model(vocab=vocab, merges=merges, ignore_merges=split.whole_words))
    except Exception as error:  # the Rust side raises a bare Exception
        raise CheckpointError(
            f"{file.path}: field 'tokenizer.ggml.merges' does not fit the vocabulary ({error})."
        ) from None
    if split.nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[Any] = []
    if split.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if split.pattern:
        steps.append(pre_tokenizers.Split(Regex(split.pattern), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split.pattern))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(file: GGUFFile, tokens: list[str], types: list[int]) -> Tokenizer:
    scores = file.numbers("tokenizer.ggml.scores", len(tokens))
    if scores is None:
        raise CheckpointError(f"{file.path}: field 'tokenizer.ggml.scores' is missing.")
    unknown = _special(file, tokens, "unknown")
    model: Any = BPE
    tokenizer = Tokenizer(
        model(
            vocab={text: id for id, text in enumerate(tokens)},
            merges=_merges_from_scores(tokens, scores.tolist(), types),
            unk_token=None if unknown is None else unknown[0],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = file.get("tokenizer.ggml.add_space_prefix", True)
    spaces: list[Any] = [normalizers.Prepend(_SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", _SPACE)])
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _merges_from_scores(
    tokens: list[str], scores: list[float], types: list[int]
) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours whose union has the best score; as BPE merges that is
    every split of every piece, ordered by the piece's score and then by the ids of the parts."""
    ids = {
        text: id
        for id, (text, kind) in enumerate(zip(tokens, types, strict=True))
        if kind == _NORMAL
    }
    find = ids.get
    found = []
    for text, id in ids.items():
        score = -scores[id]
        for cut in range(1, len(text)):
            right = find(text[cut:])
            if right is not None:
                left = find(text[:cut])
                if left is not None:
                    found.append((score, left, right))
    found.sort()
    return [(tokens[left], tokens[right]) for _, left, right in found]


def _add_special(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> None:
    for special, kinds in ((True, (CONTROL, _UNKNOWN)), (False, (_USER_DEFINED,))):
        chosen = [
            AddedToken(text, special=special, normalized=False)
            for text, kind in zip(tokens, types, strict=True)
            if kind in kinds
        ]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(chosen)


def _add_template(
    tokenizer: Tokenizer, file: GGUFFile, tokens: list[str], default_bos: bool
) -> None:
    """BOS before and EOS after the text, where the file wants them."""
    parts, special = ["$A"], []
    for key, default in (("bos", default_bos), ("eos", False)):
        entry = _special(file, tokens, key)
        if entry is not None and file.get(f"tokenizer.ggml.add_{key}_token", default):
            parts = [entry[0], *parts] if key == "bos" else [*parts, entry[0]]
            special.append(entry)
    if special:
        template: Any = TemplateProcessing
        tokenizer.post_processor = template(single=parts, special_tokens=special)
