"""Contract guarded: text in streams. Characters are never broken, stop strings never leak, however
the tokens fall; usage counts what was generated. The scripted toy makes one token of every byte."""

from __future__ import annotations

from typing import Any

import pytest
from serving import Running

MESSAGES: list[Any] = [{"role": "user", "content": "Talk."}]


def pieces(server: Running, **options: Any) -> tuple[list[str], str, Any]:
    """The content of every chunk, the finish reason, the usage."""
    stream = server.openai().chat.completions.create(
        model=server.model,
        messages=MESSAGES,
        stream=True,
        stream_options={"include_usage": True},
        **options,
    )
    chunks = list(stream)
    texts = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    return texts, reasons[-1], chunks[-1].usage


def test_characters_come_whole(scripted: Running, script: str) -> None:
    texts, reason, usage = pieces(scripted)
    assert texts == list(script)
    assert reason == "stop"
    # Every byte is a token, and the one that ends the text was generated too.
    assert usage.completion_tokens == len(script.encode()) + 1
    assert usage.prompt_tokens_details.cached_tokens == 0


@pytest.mark.parametrize("length", range(1, 30))
def test_any_length_ends_in_whole_characters_or_says_so(
    scripted: Running, script: str, length: int
) -> None:
    texts, reason, usage = pieces(scripted, max_tokens=length)
    assert "".join(texts) == script.encode()[:length].decode("utf-8", "replace")
    assert (reason, usage.completion_tokens) == ("length", length)


@pytest.mark.parametrize(
    "stop",
    [
        "STOP",
        "界",
        " ",
        "🙂",
        "👍🏽",
        "🏽",
        "end\n\nof",
        "\n",
        "it.",
        "G",
        [".", "P."],
        ["TOP", "STO"],
    ],
)
def test_stop_strings_never_leak(scripted: Running, script: str, stop: Any) -> None:
    stops = [stop] if isinstance(stop, str) else stop
    cut = min((script.index(s) + len(s), script.index(s)) for s in stops)[1]
    texts, reason, _ = pieces(scripted, stop=stop)
    assert "".join(texts) == script[:cut]
    assert reason == "stop"
    whole = scripted.openai().chat.completions.create(
        model=scripted.model, messages=MESSAGES, stop=stop, logprobs=True
    )
    assert whole.choices[0].message.content == script[:cut]
    # Tokens that only made up the stop string are gone as well.
    content = whole.choices[0].logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in content).decode() == script[:cut]


def test_near_misses_are_held_and_then_released(scripted: Running, script: str) -> None:
    texts, _, _ = pieces(scripted, stop=["STOP!", "The ends"])
    assert "".join(texts) == script
    assert "STOP." in texts
    assert "The end\n" in texts


def test_a_held_end_is_released_when_the_text_ends(scripted: Running, script: str) -> None:
    texts, reason, _ = pieces(scripted, stop="it. And more")
    assert "".join(texts) == script
    assert (texts[-1], reason) == ("it.", "stop")


def test_min_tokens_passes_over_early_stops(scripted: Running, script: str) -> None:
    second = script.index(" ", script.index(" ") + 1)
    early = len(script[: script.index(" ") + 1].encode())
    texts, _, _ = pieces(scripted, stop=" ", extra_body={"min_tokens": early + 1})
    assert "".join(texts) == script[:second]


def test_stream_of_bytes_is_valid_utf8_event_by_event(scripted: Running, script: str) -> None:
    body = {"model": scripted.model, "messages": MESSAGES, "stream": True}
    seen = 0
    with scripted.http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        for chunk in response.iter_raw():
            chunk.decode("utf-8")
            seen += chunk.count(b"data: ")
    assert seen == len(script) + 3  # the role, the finish, [DONE]
