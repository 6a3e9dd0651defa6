"""Contract guarded: common/text/output and logprobs. Text and tokens come out together, tokens of a
stop string do not come out at all, half characters wait, and the OpenAI forms are right."""

from __future__ import annotations

import json
from codecs import getincrementaldecoder

from hypothesis import given
from hypothesis import strategies as st

from sixfold.common.messages import Output, TokenLogprobs
from sixfold.common.text.logprobs import chat_logprobs, completion_logprobs, token_name
from sixfold.common.text.output import OutputText, TextDelta


class ByteText:
    """A byte is a token; 256 and above have no text (as special tokens)."""

    def __init__(self) -> None:
        self._decoder = getincrementaldecoder("utf-8")("replace")

    def step(self, token_id: int) -> str:
        return self._decoder.decode(bytes([token_id])) if token_id < 256 else ""

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b"<s>"


def lp(token_id: int) -> TokenLogprobs:
    return TokenLogprobs(token_id, -float(token_id), [token_id, 65], [-0.5, float("-inf")])


def run(
    ids: list[int], sizes: list[int], reason: str = "length", **options: object
) -> tuple[OutputText, list[TextDelta]]:
    text = OutputText(ByteText(), **options)  # type: ignore[arg-type]
    deltas, at = [], 0
    for size in [*sizes, len(ids)]:
        part = ids[at : at + size]
        at += len(part)
        last = at == len(ids)
        output = Output(
            request_id="r",
            token_ids=part,
            logprobs=[lp(i) for i in part],
            finish_reason=reason if last else None,
        )
        deltas.append(text.feed(output))
        if text.finished:
            break
    return text, deltas


@given(st.text("aé🙂\n", max_size=12), st.lists(st.integers(1, 4), max_size=8))
def test_text_is_whole_however_outputs_are_cut(content: str, sizes: list[int]) -> None:
    ids = list(content.encode())
    text, deltas = run(ids, sizes)
    assert "".join(delta.text for delta in deltas) == content
    assert not any("\ufffd" in delta.text for delta in deltas)
    tokens = [token for delta in deltas for token in delta.tokens]
    assert [token.token_id for token in tokens] == ids
    assert text.completion_tokens == len(ids)
    # Every token begins at the character that its byte belongs to.
    edges = [len(content.encode()[:i].decode("utf-8", "ignore")) for i in range(len(ids))]
    assert [token.offset for token in tokens] == edges


@given(st.text("ab\n", max_size=14), st.lists(st.integers(1, 3), max_size=8))
def test_tokens_of_a_stop_string_are_dropped_with_it(content: str, sizes: list[int]) -> None:
    _, deltas = run(list(content.encode()), sizes, stops=["\n\n", "ab\n"])
    got = "".join(delta.text for delta in deltas)
    tokens = [chr(token.token_id) for delta in deltas for token in delta.tokens]
    assert "".join(tokens) == got
    assert deltas[-1].finish_reason == ("stop" if got != content else "length")
    for delta in deltas:  # and a token never comes before its text
        assert len(delta.tokens) == len(delta.text)


def test_min_tokens_count_before_a_stop_string_does() -> None:
    text, deltas = run(list(b"a.b.c.d"), [1] * 7, stops=["."], min_tokens=4)
    assert "".join(delta.text for delta in deltas) == "a.b"
    assert text.completion_tokens == 4
    assert text.finished


def test_include_stop_and_the_ending_token() -> None:
    _, deltas = run(list(b"yes.no"), [6], stops=["."], include_stop=True)
    assert deltas[0].text == "yes."
    text = OutputText(ByteText())
    delta = text.feed(
        Output(request_id="r", token_ids=[104, 105], finish_reason="stop", stop_token_id=300)
    )
    assert (delta.text, delta.finish_reason, text.completion_tokens) == ("hi", "stop", 3)


def test_unfinished_character_at_the_end_is_replaced_and_tokens_are_complete() -> None:
    _, deltas = run(list("x🙂".encode()[:-1]), [1, 1, 1, 1])
    assert "".join(delta.text for delta in deltas) == "x\ufffd"
    assert sum(len(delta.tokens) for delta in deltas) == 4
    assert [delta.empty for delta in deltas] == [False, True, True, False]


def test_a_stop_string_can_be_completed_by_the_flush() -> None:
    _, deltas = run([97, 0xF0], [1, 1], stops=["\ufffd"])
    assert [deltas[0].text, deltas[-1].text, deltas[-1].finish_reason] == ["a", "", "stop"]


def test_token_names_stay_distinct() -> None:
    assert token_name("é".encode()) == "é"
    assert token_name(b"\xf0") == "bytes:\\xf0"
    assert len({token_name(bytes([b])) for b in range(128, 256)}) == 128


def test_openai_forms() -> None:
    _, deltas = run([104, 0xC3, 0xA9], [3])
    tokens = deltas[0].tokens
    chat = chat_logprobs(ByteText(), tokens)["content"]
    assert [entry["token"] for entry in chat] == ["h", "bytes:\\xc3", "bytes:\\xa9"]
    assert chat[1]["bytes"] == [0xC3]
    assert chat[0]["top_logprobs"] == [
        {"token": "h", "logprob": -0.5, "bytes": [104]},
        {"token": "A", "logprob": -9999.0, "bytes": [65]},
    ]
    legacy = completion_logprobs(ByteText(), tokens)
    assert legacy["text_offset"] == [0, 1, 1]
    assert legacy["token_logprobs"] == [-104.0, -195.0, -169.0]
    assert legacy["top_logprobs"][0] == {"h": -104.0, "A": -9999.0}
    json.dumps([chat, legacy], allow_nan=False)
