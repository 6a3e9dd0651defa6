"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from ...common.checkpoint.tokenizer import Tokenizer
from ...common.text.logprobs import TokenEntry, chat_logprobs
from ...common.text.output import TextDelta
from ..errors import bad_request
from ..generation import Choice, Prompt, Run, sampling
from ..images import ImageReader, NoImages, Pieces, place
from ..protocol import (
    ACCEPTED,
    REFUSED_CHAT,
    ChatMessage,
    ChatRequest,
    ImagePart,
    TextPart,
    strip_messages,
    strip_neutral,
)
from ..reading import checked, parse_json, read_body
from ..service import Loaded, Service, encode
from .answer import Dialect, answer


class ChatDialect(Dialect):
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    id_prefix = "chatcmpl-"
    body: ChatRequest

    def _logprobs(self, tokens: list[TokenEntry]) -> dict[str, Any] | None:
        return chat_logprobs(self.run.tokenizer, tokens) if self.body.logprobs else None

    def whole(self, choice: Choice, text: str, tokens: list[TokenEntry], reason: str) -> Any:
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs(tokens),
            "finish_reason": reason,
            **self.prompt_logprobs(choice),
        }

    def parts(self, choice: Choice, delta: TextDelta, first: bool) -> list[dict[str, Any]]:
        parts = []
        if first:
            role = {"role": "assistant", "content": ""}
            parts.append(self._part(choice, role, None) | self.prompt_logprobs(choice))
        if delta.text or delta.tokens:
            parts.append(self._part(choice, {"content": delta.text}, None, delta.tokens))
        if delta.finish_reason is not None:
            parts.append(self._part(choice, {}, delta.finish_reason))
        return parts

    def _part(
        self,
        choice: Choice,
        delta: dict[str, Any],
        reason: str | None,
        tokens: list[TokenEntry] | None = None,
    ) -> dict[str, Any]:
        return {
            "index": choice.index,
            "delta": delta,
            "logprobs": self._logprobs(tokens) if tokens is not None else None,
            "finish_reason": reason,
        }


async def chat_completions(request: Request) -> Response:
    service: Service = request.app.state.service
    fields = parse_json(await read_body(request, service.options.max_body_bytes))
    loaded = service.loaded
    platform = loaded.ready.platform
    fields = strip_neutral(fields, REFUSED_CHAT, ACCEPTED, platform)
    if "messages" in fields:
        fields["messages"] = strip_messages(
            fields["messages"], platform, service.model, loaded.images
        )
    body = checked(ChatRequest, fields)
    service.check_model(body.model)
    params = sampling(body, _max_tokens(body), _top_logprobs(body))
    prompt = await chat_prompt(loaded, body, special=False)
    run = Run(service, body, [prompt], params)
    return await answer(request, ChatDialect(service, body, run))


class Conversation(Protocol):
    """A body with messages and what their template takes."""

    messages: Any  # of the two bodies, one may leave them out
    add_generation_prompt: bool | None
    chat_template_kwargs: dict[str, Any] | None


async def chat_prompt(loaded: Loaded, body: Conversation, special: bool) -> Prompt:
    """The rendered conversation in tokens, its images in their places. Raises RequestError."""
    messages: list[ChatMessage] = body.messages
    reader = loaded.images
    pieces = [] if isinstance(reader, NoImages) else await _read(reader, messages)
    text = render_chat(
        loaded.tokenizer, messages, body.add_generation_prompt, body.chat_template_kwargs
    )
    ids = await encode(loaded.tokenizer, text, "messages", special)
    if isinstance(reader, NoImages):
        return Prompt(ids, "messages")
    ids, images = await asyncio.to_thread(place, ids, pieces, reader.taken)
    return Prompt(ids, "messages", images=images)


async def _read(reader: ImageReader, messages: list[ChatMessage]) -> list[Pieces]:
    """Every image, in order. Raises RequestError that names the part."""
    pieces: list[Pieces] = []
    tokens = 0
    for number, message in enumerate(messages):
        for index, part in enumerate(message.content):
            if isinstance(part, ImagePart):
                param = f"messages[{number}].content[{index}]"
                pieces.append(await reader.read(part.image_url.url, param, tokens))
                tokens += pieces[-1].tokens
    return pieces


def _content(content: str | list[TextPart | ImagePart]) -> str | list[dict[str, str]]:
    """As templates take it: a text, or with images a list of parts. Texts alone are joined by
    newlines."""
    if isinstance(content, str):
        return content
    texts = [part.text for part in content if isinstance(part, TextPart)]
    if len(texts) == len(content):
        return "\n".join(texts)
    return [
        {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image"}
        for part in content
    ]


def render_chat(
    tokenizer: Tokenizer,
    messages: list[ChatMessage],
    generation_prompt: bool | None,
    variables: dict[str, Any] | None,
) -> str:
    """The model's own template; `developer` is OpenAI's newer name of `system`. Raises
    RequestError."""
    rendered = []
    for message in messages:
        content = _content(message.content)
        role = "system" if message.role == "developer" else message.role
        name = {} if message.name is None else {"name": message.name}
        rendered.append({"role": role, "content": content, **name})
    reserved = {"messages", "add_generation_prompt"} & set(variables or ())
    if reserved:
        raise bad_request(
            f"chat_template_kwargs must not hold {', '.join(sorted(reserved))}.",
            "chat_template_kwargs",
            "invalid_value",
        )
    return tokenizer.apply_chat_template(
        rendered, generation_prompt is not False, **variables or {}
    )


def _max_tokens(body: ChatRequest) -> int | None:
    """Both names are possible; two unlike values are a contradiction."""
    old, new = body.max_tokens, body.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise bad_request(
            f"max_tokens ({old}) and max_completion_tokens ({new}) contradict each other; "
            "send one of them.",
            "max_tokens",
            "invalid_value",
        )
    return new if new is not None else old


def _top_logprobs(body: ChatRequest) -> int | None:
    if body.top_logprobs is not None and not body.logprobs:
        raise bad_request(
            "top_logprobs needs logprobs to be true.", "top_logprobs", "invalid_value"
        )
    return (body.top_logprobs or 0) if body.logprobs else None
