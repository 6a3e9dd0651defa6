"""An assistant's message as it comes: its text, and the calls of functions in it."""

from __future__ import annotations

import uuid
from typing import Any

from ...common.text.tool_calls import ToolCall, ToolCallReader
from ..generation import Choice

THINKING = "<think>"
"""The end of a prompt whose answer begins with a thought."""


class ChatAnswer:
    """Of one choice. Without tools the text is all there is."""

    def __init__(self, choice: Choice, tools: bool) -> None:
        thinking = choice.prompt.text.endswith(THINKING)
        self._reader = ToolCallReader(thinking) if tools else None

    def deltas(self, text: str, last: bool) -> tuple[str, list[dict[str, Any]]]:
        """New text -> what is certain of the content, and whole calls with their places."""
        reader = self._reader
        if reader is None:
            return text, []
        first = reader.count
        said = reader.push(text)
        calls = [{"index": first + i, **_spelled(call)} for i, call in enumerate(said.calls)]
        return said.text + (reader.flush().text if last else ""), calls

    def message(self, text: str) -> dict[str, Any]:
        """A whole answer; the content is null where calls are all there is."""
        content, calls = self.deltas(text, last=True)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message["content"] = content or None
            message["tool_calls"] = [{k: v for k, v in c.items() if k != "index"} for c in calls]
        return message

    def reason(self, reason: str) -> str:
        """Why it ended, once all of it was read."""
        called = self._reader is not None and self._reader.count
        return "tool_calls" if called and reason == "stop" else reason


def _spelled(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
