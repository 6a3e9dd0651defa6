"""Calls of functions in a model's output, found while it streams.

One form is known, DeepSeek-V4's: behind the answer and a blank line a block of invokes, each with
its parameters. What only looks like such a block is text and is delivered as it was written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .stops import pending

_MARK = "\uff5cDSML\uff5c"
_BEGIN = f"\n\n<{_MARK}tool_calls>"
_END = f"\n</{_MARK}tool_calls>"
_INVOKED = f"</{_MARK}invoke>"
_THOUGHT = "</think>"
MARKS = (_MARK, _THOUGHT)
"""Texts of tokens that must not be left out of an output in which calls are looked for."""

_INVOKE = re.compile(rf'\n<{_MARK}invoke name="([^"\n]+)">\n(.*){_INVOKED}', re.DOTALL)
_PARAMETER = re.compile(
    rf'<{_MARK}parameter name="([^"\n]+)" string="(true|false)">(.*?)</{_MARK}parameter>\n',
    re.DOTALL,
)


def calls_in_template(template: str | None) -> bool:
    """Whether a model with this chat template calls functions in the form that is read here."""
    return template is not None and "DSML" in template and "tool_calls>" in template


@dataclass(frozen=True, slots=True)
class ToolCall:
    name: str
    arguments: str  # a JSON object


@dataclass(frozen=True, slots=True)
class Said:
    """What became certain: text of the answer, then complete calls."""

    text: str = ""
    calls: tuple[ToolCall, ...] = ()


class ToolCallReader:
    """Splits one output. `thinking`: it begins with a thought, in which nothing is a call."""

    def __init__(self, thinking: bool) -> None:
        self._thinking = thinking
        self._inside = False  # of a block
        self._over = False  # nothing more is looked for
        self._held = ""
        self.count = 0  # calls so far

    def push(self, text: str) -> Said:
        """Take new text; what may still become a call is held back."""
        self._held += text
        said = self._thought() + self._answer()
        calls: list[ToolCall] = []
        while self._inside and (call := self._next()):
            calls.append(call)
        self.count += len(calls)
        return Said(said + (self._all() if self._over else ""), tuple(calls))

    def flush(self) -> Said:
        """The held text, when the output ends: what is not a whole call is text."""
        return Said(self._all())

    def _all(self) -> str:
        held, self._held = self._held, ""
        return held

    def _cut(self, length: int) -> str:
        cut, self._held = self._held[:length], self._held[length:]
        return cut

    def _thought(self) -> str:
        if not self._thinking:
            return ""
        end = self._held.find(_THOUGHT)
        if end < 0:
            return self._cut(len(self._held) - pending(self._held, [_THOUGHT]))
        self._thinking = False
        return self._cut(end + len(_THOUGHT))

    def _answer(self) -> str:
        if self._thinking or self._inside or self._over:
            return ""
        begin = self._held.find(_BEGIN)
        if begin < 0:
            return self._cut(len(self._held) - pending(self._held, [_BEGIN]))
        self._inside = True
        return self._cut(begin)

    def _next(self) -> ToolCall | None:
        """The next whole call. A block that ends or is malformed leaves the rest as text."""
        head = len(_BEGIN) if self._held.startswith(_BEGIN) else 0
        rest = self._held[head:]
        if rest.startswith(_END) and not head:
            self._held = rest[len(_END) :]
            self._inside, self._over = False, True
            return None
        end = rest.find(_INVOKED)
        if end < 0:
            return None
        call = _read(rest[: end + len(_INVOKED)])
        if call is None:
            self._inside, self._over = False, True
            return None
        self._held = rest[end + len(_INVOKED) :]
        return call


def _read(text: str) -> ToolCall | None:
    """One invoke; None for what is malformed, a name that comes twice too."""
    found = _INVOKE.fullmatch(text)
    if found is None:
        return None
    name, body = found.groups()
    given: dict[str, Any] = {}
    at = 0
    while parameter := _PARAMETER.match(body, at):
        key, plain, value = parameter.groups()
        if key in given:
            return None
        try:
            given[key] = value if plain == "true" else json.loads(value, parse_constant=_refuse)
        except ValueError:
            return None
        at = parameter.end()
    if body[at:].strip("\n"):
        return None
    return ToolCall(name, json.dumps(given, ensure_ascii=False))


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def arguments_object(arguments: str) -> Mapping[str, Any] | str:
    """A call's arguments as templates take them: an object, or what is none as it is."""
    try:
        value = json.loads(arguments)
    except ValueError:
        return arguments
    return value if isinstance(value, dict) else arguments
