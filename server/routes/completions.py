"""POST /v1/completions."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ...common.messages import Ready
from ...common.text.logprobs import TokenEntry, completion_logprobs
from ...common.text.output import TextDelta
from ..errors import bad_request
from ..generation import Choice, Prompt, Run, sampling
from ..protocol import ACCEPTED, REFUSED_COMPLETION, CompletionRequest, strip_neutral
from ..reading import checked, parse_json, read_body
from ..service import Loaded, Service, encode
from .answer import Dialect, answer

DEFAULT_MAX_TOKENS = 16  # of OpenAI's API


class CompletionDialect(Dialect):
    object = "text_completion"
    chunk_object = "text_completion"
    id_prefix = "cmpl-"
    body: CompletionRequest

    def __init__(self, service: Service, body: CompletionRequest, run: Run) -> None:
        super().__init__(service, body, run)
        self._discard = body.max_tokens == 0  # only the echo is wanted
        self._shift = [0] * len(run.choices)

    def _echo(self, choice: Choice) -> tuple[str, list[TokenEntry]]:
        """The prompt as text and as tokens; moves the offsets of what follows."""
        if not self.body.echo:
            return "", []
        text = choice.prompt.text
        self._shift[choice.index] = len(text)
        stream, position, entries = self.run.tokenizer.stream(start_of_text=True), 0, []
        for index, token_id in enumerate(choice.prompt.ids):
            given = choice.prompt_logprobs[index] if choice.prompt_logprobs else None
            entries.append(TokenEntry(token_id, position, given))
            position += len(stream.step(token_id))
        return text, entries

    def _choice(
        self, choice: Choice, text: str, tokens: list[TokenEntry], reason: str | None, first: bool
    ) -> dict[str, Any]:
        echo, prompt = self._echo(choice) if first else ("", [])
        if self._discard:
            text, tokens, reason = "", [], reason and "length"
        shift = self._shift[choice.index]
        moved = [TokenEntry(t.token_id, t.offset + shift, t.logprobs) for t in tokens]
        wanted = self.body.logprobs is not None
        logprobs = completion_logprobs(self.run.tokenizer, prompt + moved) if wanted else None
        part = {
            "index": choice.index,
            "text": echo + text,
            "logprobs": logprobs,
            "finish_reason": reason,
        }
        return part | (self.prompt_logprobs(choice) if first else {})

    def whole(self, choice: Choice, text: str, tokens: list[TokenEntry], reason: str) -> Any:
        return self._choice(choice, text, tokens, reason, True)

    def parts(self, choice: Choice, delta: TextDelta, first: bool) -> list[dict[str, Any]]:
        return [self._choice(choice, delta.text, delta.tokens, delta.finish_reason, first)]

    def answer(self, choices: list[Any], usage: dict[str, Any]) -> dict[str, Any]:
        return super().answer(choices, self._counted(usage))

    def chunk(self, choices: list[Any], usage: dict[str, Any] | None = None) -> bytes:
        return super().chunk(choices, usage and self._counted(usage))

    def _counted(self, usage: dict[str, Any]) -> dict[str, Any]:
        if not self._discard:
            return usage
        return usage | {"completion_tokens": 0, "total_tokens": usage["prompt_tokens"]}


async def completions(request: Request) -> Response:
    service: Service = request.app.state.service
    fields = parse_json(await read_body(request, service.options.max_body_bytes))
    loaded = service.loaded
    fields = strip_neutral(fields, REFUSED_COMPLETION, ACCEPTED, loaded.ready.platform)
    body = checked(CompletionRequest, fields)
    service.check_model(body.model)
    _check(body, loaded.ready)
    prompts = await _prompts(body, loaded)
    limit = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    # The engine always samples; for a bare echo its one token is dropped.
    params = sampling(body, limit or 1, body.logprobs)
    if body.echo and body.logprobs is not None:
        params = msgspec.structs.replace(
            params, prompt_logprobs=max(body.logprobs, body.prompt_logprobs or 0)
        )
    run = Run(service, body, prompts, params)
    return await answer(request, CompletionDialect(service, body, run))


def _check(body: CompletionRequest, ready: Ready) -> None:
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise bad_request(
            f"best_of other than n is not supported by Sixfold on the platform "
            f"{ready.platform!r}. Leave it out.",
            "best_of",
            "unsupported_parameter",
        )
    if body.max_tokens == 0 and not body.echo:
        raise bad_request(
            "max_tokens must be at least 1 unless echo is true, got 0.",
            "max_tokens",
            "invalid_value",
        )


async def _prompts(body: CompletionRequest, loaded: Loaded) -> list[Prompt]:
    given: list[Any] = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    if given and isinstance(given[0], int):
        given = [given]
    if not given:
        raise bad_request("prompt is empty.", "prompt", "invalid_value")
    tokenizer = loaded.tokenizer
    prompts = []
    for index, one in enumerate(given):
        where = "prompt" if len(given) == 1 else f"prompt[{index}]"
        if isinstance(one, str):
            prompts.append(Prompt(await encode(tokenizer, one, where), where, one))
        else:
            check_ids(one, loaded.ready, where)
            prompts.append(Prompt(one, where, tokenizer.decode(one) if body.echo else ""))
    return prompts


def check_ids(ids: list[int], ready: Ready, where: str) -> None:
    """Raises ApiError for an id outside of the vocabulary."""
    bad = next((i for i in ids if not 0 <= i < ready.vocab_size), None)
    if bad is not None:
        raise bad_request(
            f"{where} holds the token id {bad}; ids are in 0..{ready.vocab_size - 1}.",
            where,
            "invalid_value",
        )
