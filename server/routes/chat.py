"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from ...common.checkpoint.tokenizer import Tokenizer
from ...common.text.logprobs import TokenEntry, chat_logprobs
from ...common.text.output import TextDelta
from ...common.text.tool_calls import MARKS, arguments_object
from ..errors import bad_request
from ..generation import Choice, Prompt, Run, sampling
from ..images import ImageReader, NoImages, Pieces, place
from ..protocol import (
    ACCEPTED,
    ChatMessage,
    ChatRequest,
    ImagePart,
    TextPart,
    Tool,
    refused_in_chat,
    strip_messages,
    strip_neutral,
)
from ..reading import checked, parse_json, read_body
from ..service import Loaded, Service, encode
from .answer import Dialect, answer
from .chat_answer import ChatAnswer


class ChatDialect(Dialect):
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    id_prefix = "chatcmpl-"
    body: ChatRequest

    def __init__(self, service: Service, body: ChatRequest, run: Run) -> None:
        super().__init__(service, body, run)
        self._answers = [ChatAnswer(choice, bool(body.tools)) for choice in run.choices]

    def _logprobs(self, tokens: list[TokenEntry]) -> dict[str, Any] | None:
        return chat_logprobs(self.run.tokenizer, tokens) if self.body.logprobs else None

    def whole(self, choice: Choice, text: str, tokens: list[TokenEntry], reason: str) -> Any:
        answer = self._answers[choice.index]
        message = answer.message(text)
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(tokens),
            "finish_reason": answer.reason(reason),
            **self.prompt_logprobs(choice),
        }

    def parts(self, choice: Choice, delta: TextDelta, first: bool) -> list[dict[str, Any]]:
        parts = []
        if first:
            role = {"role": "assistant", "content": ""}
            parts.append(self._part(choice, role, None) | self.prompt_logprobs(choice))
        answer = self._answers[choice.index]
        last = delta.finish_reason is not None
        text, calls = answer.deltas(delta.text, last)
        if text or delta.tokens:
            parts.append(self._part(choice, {"content": text}, None, delta.tokens))
        parts += [self._part(choice, {"tool_calls": [call]}, None) for call in calls]
        if delta.finish_reason is not None:
            parts.append(self._part(choice, {}, answer.reason(delta.finish_reason)))
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
    offered = bool(fields.get("tools")) and fields.get("tool_choice") != "none"
    refused = refused_in_chat(loaded.tools, offered)
    fields = strip_neutral(fields, refused, ACCEPTED, platform)
    if "messages" in fields:
        fields["messages"] = strip_messages(
            fields["messages"], platform, service.model, loaded.images, loaded.tools
        )
    body = checked(ChatRequest, fields)
    service.check_model(body.model)
    if not offered:
        body.tools = None  # checked, and not to be called
    params = sampling(body, _max_tokens(body), _top_logprobs(body))
    prompt = await chat_prompt(loaded, body, special=False)
    run = Run(service, body, [prompt], params, MARKS if body.tools else ())
    return await answer(request, ChatDialect(service, body, run))


class Conversation(Protocol):
    """A body with messages and what their template takes."""

    messages: Any  # of the two bodies, one may leave them out
    add_generation_prompt: bool | None
    chat_template_kwargs: dict[str, Any] | None
    tools: list[Tool] | None


async def chat_prompt(loaded: Loaded, body: Conversation, special: bool) -> Prompt:
    """The rendered conversation in tokens, its images in their places. Raises RequestError."""
    messages: list[ChatMessage] = body.messages
    reader = loaded.images
    pieces = [] if isinstance(reader, NoImages) else await _read(reader, messages)
    text = render_chat(
        loaded.tokenizer,
        messages,
        body.add_generation_prompt,
        body.chat_template_kwargs,
        body.tools,
    )
    ids = await encode(loaded.tokenizer, text, "messages", special)
    if isinstance(reader, NoImages):
        return Prompt(ids, "messages", text)
    ids, images = await asyncio.to_thread(place, ids, pieces, reader.taken)
    return Prompt(ids, "messages", text, images)


async def _read(reader: ImageReader, messages: list[ChatMessage]) -> list[Pieces]:
    """Every image, in order. Raises RequestError that names the part."""
    pieces: list[Pieces] = []
    tokens = 0
    for number, message in enumerate(messages):
        for index, part in enumerate(message.content or ()):
            if isinstance(part, ImagePart):
                param = f"messages[{number}].content[{index}]"
                pieces.append(await reader.read(part.image_url.url, param, tokens))
                tokens += pieces[-1].tokens
    return pieces


def _content(
    content: str | list[TextPart | ImagePart] | None,
) -> str | list[dict[str, str]] | None:
    """As templates take it: a text, or with images a list of parts. Texts alone are joined by
    newlines."""
    if content is None or isinstance(content, str):
        return content
    texts = [part.text for part in content if isinstance(part, TextPart)]
    if len(texts) == len(content):
        return "\n".join(texts)
    return [
        {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image"}
        for part in content
    ]


def _rendered(message: ChatMessage) -> dict[str, Any]:
    """As templates take it; `developer` is OpenAI's newer name of `system`."""
    role = "system" if message.role == "developer" else message.role
    more: dict[str, Any] = message.model_dump(
        include={"name", "tool_call_id", "tool_calls"}, exclude_none=True
    )
    for call in more.get("tool_calls", ()):
        call["function"]["arguments"] = arguments_object(call["function"]["arguments"])
    return {"role": role, "content": _content(message.content), **more}


def render_chat(
    tokenizer: Tokenizer,
    messages: list[ChatMessage],
    generation_prompt: bool | None,
    variables: dict[str, Any] | None,
    tools: list[Tool] | None = None,
) -> str:
    """The model's own template. Raises RequestError."""
    given = dict(variables or {})
    own = {"messages", "add_generation_prompt"} | ({"tools"} if tools else set())
    reserved = own & set(given)
    if reserved:
        raise bad_request(
            f"chat_template_kwargs must not hold {', '.join(sorted(reserved))}.",
            "chat_template_kwargs",
            "invalid_value",
        )
    if tools:
        given["tools"] = [tool.model_dump(exclude_none=True) for tool in tools]
    rendered = [_rendered(message) for message in messages]
    return tokenizer.apply_chat_template(rendered, generation_prompt is not False, **given)


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
