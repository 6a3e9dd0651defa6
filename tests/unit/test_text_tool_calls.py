"""Guards common/text/tool_calls.py: calls of functions are found in an output however it is cut,
arguments are rebuilt with their types, and what is no call stays the text that it was."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from sixfold.common.checkpoint.built_in_templates import BUILT_IN
from sixfold.common.checkpoint.chat_template import ChatTemplate
from sixfold.common.text.tool_calls import (
    MARKS,
    ToolCall,
    ToolCallReader,
    arguments_object,
    calls_in_template,
)

D = MARKS[0]


def parameter(name: str, value: str, plain: bool = True) -> str:
    kind = "true" if plain else "false"
    return f'<{D}parameter name="{name}" string="{kind}">{value}</{D}parameter>\n'


def invoke(name: str, *parameters: str) -> str:
    return f'\n<{D}invoke name="{name}">\n{"".join(parameters)}</{D}invoke>'


def block(*invokes: str) -> str:
    return f"\n\n<{D}tool_calls>{''.join(invokes)}\n</{D}tool_calls>"


def read(text: str, thinking: bool = False, cuts: int | None = None) -> tuple[str, list[ToolCall]]:
    """Fed whole, one character at a time (0), or in random pieces of a seed."""
    reader = ToolCallReader(thinking)
    places = list(range(1, len(text)))
    if cuts is None:
        places = []
    elif cuts:
        rng = np.random.default_rng(cuts)
        places = sorted(rng.choice(len(text), min(6, len(text)), replace=False).tolist())
    pieces = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
    said = [*map(reader.push, pieces), reader.flush()]
    calls = [call for part in said for call in part.calls]
    assert reader.count == len(calls)
    return "".join(part.text for part in said), calls


ONE = invoke("weather", parameter("city", "Zürich"), parameter("days", "3", False))
BOTH = block(ONE, invoke("stop"))
CASES: dict[str, tuple[str, bool, str | None, list[tuple[str, Any]]]] = {
    "text": ("Hello.\n\n<b>", False, "Hello.\n\n<b>", []),
    "one": ("It is:" + block(ONE), False, "It is:", [("weather", {"city": "Zürich", "days": 3})]),
    "alone": (block(ONE), False, "", [("weather", {"city": "Zürich", "days": 3})]),
    "two": (
        BOTH, False, "", [("weather", {"city": "Zürich", "days": 3}), ("stop", {})]
    ),
    "types": (
        block(invoke("f", parameter("a", '[1, {"b": null}]', False), parameter("s", "[1]"))),
        False, "", [("f", {"a": [1, {"b": None}], "s": "[1]"})],
    ),
    "raw": (
        block(invoke("f", parameter("t", 'a\n"b" </x>\n\n'))),
        False, "", [("f", {"t": 'a\n"b" </x>\n\n'})],
    ),
    "empty_line": (block(invoke("f", "\n")), False, "", [("f", {})]),
    "thought": (
        f"Call{block(ONE)}?</think>No.{block(invoke('stop'))}", True,
        f"Call{block(ONE)}?</think>No.", [("stop", {})],
    ),
    "thought_only": (f"hm{block(ONE)}", True, f"hm{block(ONE)}", []),
    "text_behind": (block(ONE) + " Bye", False, " Bye",
        [("weather", {"city": "Zürich", "days": 3})]),
    "twice": (block(invoke("f", parameter("a", "1"), parameter("a", "2"))), False, None, []),
    "no_json": (block(invoke("f", parameter("a", "{", False))), False, None, []),
    "nan": (block(invoke("f", parameter("a", "NaN", False))), False, None, []),
    "unfinished": ("x" + block(ONE)[:-10], False, "x" + block()[:-10].rpartition(">")[2],
        [("weather", {"city": "Zürich", "days": 3})]),
    "cut_off": (block(ONE)[:40], False, None, []),
    "no_invoke": (block(), False, None, []),
    "nonsense": (block("\nhello", invoke("f")), False, None, []),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_calls_and_text_whatever_the_cuts(name: str) -> None:
    """A text of None: all of it, as it was written."""
    text, thinking, said, calls = CASES[name]
    wanted = text if said is None else said
    for cuts in (None, 0, 1, 2, 3):
        found, made = read(text, thinking, cuts)
        assert found == wanted
        assert [(call.name, json.loads(call.arguments)) for call in made] == calls


def test_text_is_held_back_only_while_it_may_become_a_call() -> None:
    reader = ToolCallReader(thinking=False)
    assert reader.push("A\n").text == "A"
    assert reader.push("\n").text == ""
    assert reader.push("B").text == "\n\nB"
    assert reader.push(f"\n\n<{D}tool").text == ""
    assert reader.push("s").text == f"\n\n<{D}tools"


def test_a_call_is_given_as_soon_as_it_is_whole() -> None:
    reader = ToolCallReader(thinking=False)
    assert reader.push(BOTH[: BOTH.index(f"</{D}invoke>")]).calls == ()
    assert [call.name for call in reader.push(f"</{D}invoke>").calls] == ["weather"]


def test_what_the_template_renders_is_read_back() -> None:
    """The form of a call is written in two places: this ties them."""
    given = {"city": "Zürich", "list": [1, "x"], "none": None, "text": "a\nb", "yes": True}
    call = {"id": "1", "function": {"name": "f", "arguments": given}}
    odd = {"id": "2", "function": {"name": "g", "arguments": "[1]"}}
    template = ChatTemplate({"default": BUILT_IN["deepseek_v4"]}, {})
    talk = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "So:", "tool_calls": [call, odd]},
    ]
    text = template.render(talk, False).split("</think>")[1].rpartition("<")[0]
    said, calls = read(text)
    assert said == "So:"
    assert [(c.name, json.loads(c.arguments)) for c in calls] == [
        ("f", given),
        ("g", {"arguments": "[1]"}),
    ]


def test_which_templates_call_functions_so() -> None:
    assert calls_in_template(BUILT_IN["deepseek_v4"])
    assert not calls_in_template("{{ tools }}<tool_call>")
    assert not calls_in_template(None)


@pytest.mark.parametrize(
    ("text", "value"), [('{"a": 1}', {"a": 1}), ("[1]", "[1]"), ("{", "{"), ("", "")]
)
def test_arguments_are_objects_or_stay_as_they_are(text: str, value: Any) -> None:
    assert arguments_object(text) == value
