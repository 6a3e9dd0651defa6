"""Renders chat templates (Jinja) in a sandbox, with what published templates expect to find."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import CheckpointError, RequestError

Messages = Sequence[Mapping[str, Any]]


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's text for training: a plain block
    here."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A model's chat templates, compiled on first use."""

    def __init__(self, templates: Mapping[str, str], special: Mapping[str, str]) -> None:
        self.templates = dict(templates)
        self._special = dict(special)
        self._compiled: dict[str, Callable[..., str]] = {}

    @property
    def default(self) -> str | None:
        return self.templates.get("default")

    def replace(self, source: str) -> None:
        """Use `source` for every conversation from now on. Raises CheckpointError."""
        try:
            compiled = _environment().from_string(source).render
        except TemplateSyntaxError as error:
            raise CheckpointError(
                f"The chat template cannot be compiled: {error.message} (line {error.lineno})."
            ) from None
        self.templates = {"default": source}
        self._compiled = {"default": compiled}

    def render(self, messages: Messages, add_generation_prompt: bool, **variables: Any) -> str:
        """The prompt text. Raises RequestError when there is no template or it refuses."""
        name = "tool_use" if variables.get("tools") and "tool_use" in self.templates else "default"
        if name not in self.templates:
            raise RequestError(
                "This model has no chat template; use /v1/completions with a plain prompt.",
                "messages",
                "no_chat_template",
            )
        context = {**self._special, "tools": None, "documents": None, **variables}
        try:
            render = self._compile(name)
            return render(messages=messages, add_generation_prompt=add_generation_prompt, **context)
        except TemplateSyntaxError as error:
            raise self._refusal(
                f"cannot be compiled: {error.message} (line {error.lineno})"
            ) from None
        except TemplateError as error:
            raise self._refusal(f"refuses these messages: {error.message}") from None
        except Exception as error:  # a template is a program: it may raise anything
            raise self._refusal(f"cannot render these messages: {error}") from None

    def _compile(self, name: str) -> Callable[..., str]:
        if name not in self._compiled:
            self._compiled[name] = _environment().from_string(self.templates[name]).render
        return self._compiled[name]

    @staticmethod
    def _refusal(what: str) -> RequestError:
        return RequestError(f"The model's chat template {what}.", "messages", "chat_template")


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.filters["tojson"] = _to_json
    return environment


def _raise(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    """JSON as models were trained on: not escaped for HTML, non-ASCII kept."""
    allowed = {k: v for k, v in options.items() if k in ("separators", "sort_keys")}
    ascii_only = bool(options.get("ensure_ascii", False))
    return json.dumps(value, ensure_ascii=ascii_only, indent=indent, **allowed)
