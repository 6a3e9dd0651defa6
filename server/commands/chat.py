"""`sixfold chat`."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any, Protocol

import click

from ...common.errors import SixfoldError

Messages = list[dict[str, str]]


class _Talker(Protocol):
    def answer(self, messages: Messages) -> Iterator[str]:
        """The pieces of the next answer, as they come."""
        ...


class _Remote:
    """Talks to an OpenAI-compatible server."""

    def __init__(self, url: str, model: str, key: str | None, options: dict[str, Any]) -> None:
        import httpx

        headers = {"Authorization": f"Bearer {key}"} if key else {}
        base = url.rstrip("/").removesuffix("/v1")
        self._client = httpx.Client(base_url=base, headers=headers, timeout=None)
        self._options = options
        self._model = model or self._served()

    def _served(self) -> str:
        import httpx

        try:
            answer = self._client.get("/v1/models")
        except httpx.HTTPError as error:
            raise SixfoldError(f"{self._client.base_url} does not answer: {error}.") from None
        _refuse_error(answer.status_code, answer.text)
        return str(answer.json()["data"][0]["id"])

    def answer(self, messages: Messages) -> Iterator[str]:
        import httpx

        body = {"model": self._model, "messages": messages, "stream": True, **self._options}
        try:
            with self._client.stream("POST", "/v1/chat/completions", json=body) as answer:
                if answer.status_code != 200:
                    answer.read()
                    _refuse_error(answer.status_code, answer.text)
                for line in answer.iter_lines():
                    yield from _pieces(line)
        except httpx.HTTPError as error:
            raise SixfoldError(f"The connection broke: {error}.") from None


class _Local:
    """Talks to an engine in this process."""

    def __init__(self, model: str, platform: str | None, options: dict[str, Any]) -> None:
        from ..llm import LLM

        self._llm = LLM(model, platform=platform)
        self._options = options

    def answer(self, messages: Messages) -> Iterator[str]:
        from ...common.sampling import SamplingParams
        from ..seeds import random_seed

        params = SamplingParams(seed=random_seed(), **self._options)
        return self._llm.stream(self._llm.chat_prompt(messages), params)


def _refuse_error(status: int, text: str) -> None:
    if status == 200:
        return
    try:
        text = json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        text = text[:200]
    raise SixfoldError(f"The server answered {status}: {text}")


def _pieces(line: str) -> Iterator[str]:
    if not line.startswith("data: ") or line == "data: [DONE]":
        return
    event = json.loads(line.removeprefix("data: "))
    if "error" in event:
        raise SixfoldError(f"The server stopped: {event['error']['message']}")
    for choice in event["choices"]:
        yield choice["delta"].get("content") or ""


@click.command()
@click.argument("model", default="")
@click.option("--url", help="Talk to this server instead of starting an engine here.")
@click.option("--api-key", help="Key for --url.")
@click.option("--platform", help="Hardware to run on; the best usable one if not given.")
@click.option("--system", help="System message of the conversation.")
@click.option("--max-tokens", type=click.IntRange(1), help="Most tokens of one answer.")
@click.option("--temperature", type=float, help="0 always takes the likeliest token.")
def chat(
    model: str,
    url: str | None,
    api_key: str | None,
    platform: str | None,
    system: str | None,
    max_tokens: int | None,
    temperature: float | None,
) -> None:
    """Talk to MODEL, or to the demo model. An empty line or Ctrl-D ends; Ctrl-C stops an answer."""
    given = {"max_tokens": max_tokens, "temperature": temperature}
    options = {name: value for name, value in given.items() if value is not None}
    talker: _Talker = (
        _Remote(url, model, api_key, options) if url else _Local(model, platform, options)
    )
    messages: Messages = [{"role": "system", "content": system}] if system else []
    while said := _ask():
        messages.append({"role": "user", "content": said})
        messages.append({"role": "assistant", "content": _print(talker.answer(messages))})


def _ask() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        return ""


def _print(pieces: Iterator[str]) -> str:
    said = []
    with contextlib.suppress(KeyboardInterrupt):
        for piece in pieces:
            said.append(piece)
            click.echo(piece, nl=False)
            sys.stdout.flush()
    click.echo("\n")
    return "".join(said)
