"""The request bodies of the HTTP API: every field that OpenAI documents is decided here, once.

Three kinds of fields: those served (attributes of the models below), those that change nothing and
are accepted (`ACCEPTED`), and those that ask for something this engine does not do (`REFUSED`):
they pass only with a value that asks for nothing. Any other field is unknown and is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
)

from ..common.errors import RequestError
from .images import ImageReader, NoImages

ACCEPTED = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key"})
"""Labels for the caller's own use: they ask for no behaviour."""

NOTHING: tuple[Any, ...] = (None,)

REFUSED_CHAT: Mapping[str, tuple[Any, ...]] = {
    "audio": NOTHING,
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "modalities": (None, ["text"]),
    "moderation": NOTHING,
    "parallel_tool_calls": (None, True, False),
    "prediction": NOTHING,
    "prompt_cache_options": NOTHING,
    "prompt_cache_retention": (None, "in_memory", "in-memory"),
    "reasoning_effort": NOTHING,
    "response_format": (None, {"type": "text"}),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "verbosity": (None, "medium"),
    "web_search_options": NOTHING,
}
TOOL_FIELDS: Mapping[str, tuple[Any, ...]] = {
    "parallel_tool_calls": (None, True),
    "tool_choice": (None, "none", "auto"),
}
"""The same where the model calls functions: `tools` is served."""

REFUSED_COMPLETION: Mapping[str, tuple[Any, ...]] = {"suffix": (None, "")}
REFUSED_MESSAGE: Mapping[str, tuple[Any, ...]] = {
    "audio": NOTHING,
    "function_call": NOTHING,
    "refusal": NOTHING,
    "tool_calls": (None, []),
    "annotations": (None, []),
}


class Body(BaseModel):
    """Strict: no unknown field, no number given as a string."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class TextPart(Body):
    type: str
    text: str


class ImageUrl(Body):
    url: str
    detail: Literal["auto", "high"] | None = None  # an image is never made smaller than the model's


class ImagePart(Body):
    type: Literal["image_url"]
    image_url: ImageUrl


def _kind(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else getattr(part, "type", None)
    return "ImagePart" if kind == "image_url" else "TextPart"


ContentPart = Annotated[
    Annotated[TextPart, Tag("TextPart")] | Annotated[ImagePart, Tag("ImagePart")],
    Discriminator(_kind),
]


class Function(Body):
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = None  # arguments are not held to their schema


class Tool(Body):
    type: Literal["function"]
    function: Function


class CalledFunction(Body):
    name: str
    arguments: str


class MessageToolCall(Body):
    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    tool_calls: list[MessageToolCall] | None = None
    content: str | list[ContentPart] | None
    tool_call_id: str | None = Field(default=None, validate_default=True)
    name: str | None = None

    @field_validator("tool_calls")
    @classmethod
    def _by_assistant(cls, value: Any, info: ValidationInfo) -> Any:
        if value and info.data.get("role") != "assistant":
            raise ValueError("only a message of the role assistant calls tools")
        return value

    @field_validator("content")
    @classmethod
    def _said(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None and not info.data.get("tool_calls"):
            raise ValueError("must be a text or a list of parts")
        return value

    @field_validator("tool_call_id")
    @classmethod
    def _of_a_call(cls, value: str | None, info: ValidationInfo) -> str | None:
        if (info.data.get("role") == "tool") != (value is not None):
            raise ValueError("names the call that a message of the role tool answers")
        return value


class Sampled(Body):
    """What chat and text completions share: OpenAI's fields, then this engine's own."""

    model: str
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: int | None = None
    n: int | None = Field(default=None, ge=1, le=128)
    presence_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None

    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    prompt_logprobs: int | None = None
    include_stop_str_in_output: bool | None = None
    priority: int | None = Field(default=None, ge=-(2**31), lt=2**31)

    @field_validator("logit_bias")
    @classmethod
    def _ids(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        if value and not all(key.isascii() and key.isdigit() and len(key) < 10 for key in value):
            raise ValueError("keys must be token ids")
        return value

    @field_validator("stream_options")
    @classmethod
    def _streamed(cls, value: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        if value is not None and not info.data.get("stream"):
            raise ValueError("only possible when stream is true")
        return value

    @field_validator("stop")
    @classmethod
    def _stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        stops = [value] if isinstance(value, str) else value or []
        if len(stops) > 16:
            raise ValueError("at most 16 stop strings are possible")
        if "" in stops:
            raise ValueError("a stop string must not be empty")
        return value

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(Sampled):
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0)
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None


class CompletionRequest(Sampled):
    prompt: str | list[int] | list[str] | list[list[int]]
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None


class TokenizeRequest(Body):
    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(default=None, min_length=1)
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: list[int]


REFUSED: Mapping[type[Body], Mapping[str, tuple[Any, ...]]] = {
    ChatRequest: REFUSED_CHAT,
    CompletionRequest: REFUSED_COMPLETION,
}


def refused_in_chat(tools: bool, offered: bool) -> Mapping[str, tuple[Any, ...]]:
    """`tools`: the model calls functions; `offered`: and is given some."""
    if not tools:
        return REFUSED_CHAT
    fields = {name: values for name, values in REFUSED_CHAT.items() if name != "tools"}
    return {**fields, **TOOL_FIELDS} if offered else fields


def strip_neutral(
    fields: Mapping[str, Any],
    refused: Mapping[str, tuple[Any, ...]],
    accepted: frozenset[str],
    platform: str,
    where: str = "",
) -> dict[str, Any]:
    """Remove fields that ask for nothing. Raises RequestError for one that asks for what is not
    there. A value is neutral only with the same type: 1 is not True."""
    kept: dict[str, Any] = {}
    for name, value in fields.items():
        if name in accepted:
            continue
        if name not in refused:
            kept[name] = value
            continue
        if not any(type(value) is type(neutral) and value == neutral for neutral in refused[name]):
            raise RequestError(
                f"{where}{name} is not supported by Sixfold on the platform {platform!r}. "
                "Leave it out.",
                f"{where}{name}",
                "unsupported_parameter",
            )
    return kept


def strip_messages(
    messages: Any, platform: str, model: str, images: ImageReader | NoImages, tools: bool
) -> Any:
    """Apply the field table to chat messages and refuse what the model cannot read. Malformed
    shapes are left for validation to name."""
    if not isinstance(messages, list):
        return messages
    result: list[Any] = []
    roles = ("function",) if tools else ("tool", "function")
    refused = {k: v for k, v in REFUSED_MESSAGE.items() if not tools or k != "tool_calls"}
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            result.append(message)
            continue
        where = f"messages[{index}]."
        _refuse_parts(message.get("content"), where, model, images)
        if message.get("role") in roles:
            why = "tool results have the role tool" if tools else "this model has no tools here"
            raise RequestError(
                f"{where}role {message['role']!r} is not supported by Sixfold on the platform "
                f"{platform!r}: {why}. Use system, developer, user or assistant.",
                f"{where}role",
                "unsupported_value",
            )
        kept = strip_neutral(message, refused, frozenset(), platform, where)
        result.append({"content": None, **kept} if kept.get("tool_calls") else kept)
    return result


def _refuse_parts(content: Any, where: str, model: str, images: ImageReader | NoImages) -> None:
    blind = isinstance(images, NoImages)
    for index, part in enumerate(content if isinstance(content, list) else ()):
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str) or kind == "text" or (kind == "image_url" and not blind):
            continue
        reads = "text only" if blind else "text and images (image_url) only"
        why = f" {images.reason}" if isinstance(images, NoImages) and kind == "image_url" else ""
        raise RequestError(
            f"The model {model!r} reads {reads} here; {where}content[{index}] is of type {kind!r}."
            f"{why}",
            f"{where}content[{index}].type",
            "unsupported_value",
        )
