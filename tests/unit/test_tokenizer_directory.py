"""Contract: a directory's tokenizer is its tokenizer.json, its chat template is found wherever
files keep it, templates run in a sandbox, and what is broken is refused with one sentence.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from sixfold.common.checkpoint.checkpoint import open_checkpoint
from sixfold.common.checkpoint.detokenize import byte_table
from sixfold.common.checkpoint.tokenizer import Tokenizer, load_tokenizer
from sixfold.common.errors import CheckpointError, RequestError

USER = [{"role": "user", "content": "hi"}]


def write(path: Path, config: dict[str, Any] | None = None) -> Path:
    vocab = byte_table()
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True) for t in ("<s>", "</s>")])
    backend.post_processor = processors.TemplateProcessing(
        single=["<s>", "$A"], special_tokens=[("<s>", 256)]
    )
    backend.enable_truncation(4)
    backend.enable_padding(length=4)
    backend.save(str(path / "tokenizer.json"))
    sizes = {"model_type": "toy", "vocab_size": 300, "max_position_embeddings": 64}
    (path / "config.json").write_text(json.dumps(sizes))
    texts = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    (path / "tokenizer_config.json").write_text(json.dumps({**texts, **(config or {})}))
    return path


def load(path: Path) -> Tokenizer:
    return load_tokenizer(open_checkpoint(path))


def test_text_is_neither_cut_nor_padded(tmp_path: Path) -> None:
    tokenizer = load(write(tmp_path))
    assert tokenizer.encode("abcdefg") == [256, *b"abcdefg"]
    assert tokenizer.encode("a", add_special_tokens=False) == [97]
    assert tokenizer.decode([256, 97, 257]) == "a"
    assert tokenizer.decode([256, 97, 257], skip_special_tokens=False) == "<s>a</s>"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (256, {257})
    assert tokenizer.vocab_size == 258


def test_equals_the_transformers_tokenizer(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = load(write(tmp_path))
    oracle = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    template = (
        "{{ bos_token }}{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}\n"
        "  [{{ m.role }}] {{ m['content'] | trim }}{% generation %}!{% endgeneration %}\n"
        "{% endfor %}"
        "{{ tools | tojson(indent=1) if tools else 'none' }}"
        "{% if add_generation_prompt %}>{% endif %}"
    )
    oracle.chat_template = template
    oracle.bos_token = "<s>"
    path = write(tmp_path, {"chat_template": template})
    ours = load(path)
    talk = [*USER, {"role": "x", "content": "skipped"}, {"role": "assistant", "content": " é <b> "}]
    tools = [{"type": "function", "function": {"name": "naïve", "parameters": {"a": [1, "<"]}}}]
    for options in ({"add_generation_prompt": True}, {"tools": tools}):
        prompt = options.get("add_generation_prompt", False)
        rest = {k: v for k, v in options.items() if k != "add_generation_prompt"}
        expected = oracle.apply_chat_template(talk, tokenize=False, **options)
        assert ours.apply_chat_template(talk, bool(prompt), **rest) == expected
    for text in ("Hello é 日本", "a  b\n"):
        assert tokenizer.encode(text) == oracle.encode(text)


def test_places_of_the_template(tmp_path: Path) -> None:
    assert load(write(tmp_path)).chat_template is None
    several = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    tokenizer = load(write(tmp_path, {"chat_template": several}))
    assert tokenizer.chat_template == "D"
    assert tokenizer.apply_chat_template(USER) == "D"
    assert tokenizer.apply_chat_template(USER, tools=[{}]) == "T"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "J"}))
    assert load(tmp_path).chat_template == "J"
    (tmp_path / "chat_template.jinja").write_text("F")
    assert load(tmp_path).chat_template == "F"


def test_no_template_is_a_request_error(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no chat template") as caught:
        load(write(tmp_path)).apply_chat_template(USER)
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "cannot be compiled"),
        ("{{ messages[0].content.absent.more }}", "refuses"),
        ("{{ messages[5]['x'] }}", "refuses"),
        ("{{ messages[0].content + 1 }}", "cannot render"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses"),
        ("{{ messages.append(1) }}", "refuses"),
        ("{{ 1 // 0 }}", "cannot render"),
    ],
)
def test_a_failing_template_is_a_request_error(template: str, words: str, tmp_path: Path) -> None:
    tokenizer = load(write(tmp_path, {"chat_template": template}))
    with pytest.raises(RequestError) as caught:
        tokenizer.apply_chat_template(USER)
    assert words in caught.value.message
    assert caught.value.param == "messages"
    assert caught.value.status == 400


def test_templates_know_the_date_and_extra_variables(tmp_path: Path) -> None:
    template = "{{ strftime_now('%Y') | length }} {{ enable_thinking }} {{ documents is none }}"
    tokenizer = load(write(tmp_path, {"chat_template": template}))
    assert tokenizer.apply_chat_template(USER, enable_thinking=False) == "4 False True"


def test_broken_tokenizer_file(tmp_path: Path) -> None:
    (write(tmp_path) / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a valid tokenizer"):
        load(tmp_path)


def test_no_tokenizer(tmp_path: Path) -> None:
    (write(tmp_path) / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        load(tmp_path)


def test_an_older_tokenizer_is_converted(tmp_path: Path) -> None:
    """vocab.json and merges.txt only: transformers converts them."""
    path = write(tmp_path)
    (path / "tokenizer.json").unlink()
    vocab = {**byte_table(), "ab": 256, "<|endoftext|>": 257}
    (path / "vocab.json").write_text(json.dumps(vocab))
    (path / "merges.txt").write_text("#version: 0.2\na b\n")
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    tokenizer = load(path)
    assert tokenizer.encode("abc") == [256, vocab["c"]]
    assert tokenizer.decode([256, vocab["c"]]) == "abc"


def test_an_older_tokenizer_that_cannot_be_converted(tmp_path: Path) -> None:
    path = write(tmp_path)
    (path / "tokenizer.json").unlink()
    (path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json") as caught:
        load(path)
    assert "\n" not in str(caught.value)
