"""Contract guarded: functions of /v1/chat/completions with the official client, for a model whose
calls can be read: they are offered in the prompt, calls come as `tool_calls`, whole and streamed,
their results go back in, and what could not be held to is a 400."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest
from serving import Launcher, Running
from toy_checkpoint import write_toy_checkpoint

from sixfold.common.checkpoint.built_in_templates import BUILT_IN
from sixfold.common.text.tool_calls import MARKS

D = MARKS[0]
BEGIN = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
SAID = "I look. "
SCRIPT = (
    f'{SAID}\n\n<{D}tool_calls>\n<{D}invoke name="weather">\n'
    f'<{D}parameter name="city" string="true">Zürich</{D}parameter>\n'
    f'<{D}parameter name="days" string="false">3</{D}parameter>\n</{D}invoke>\n'
    f'<{D}invoke name="now">\n</{D}invoke>\n</{D}tool_calls>'
)
WANTED = [("weather", {"city": "Zürich", "days": 3}), ("now", {})]
PLACE = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "parameters": PLACE}},
    {"type": "function", "function": {"name": "now", "description": "the time", "strict": False}},
]
ASKED: list[Any] = [{"role": "user", "content": "Rain?"}]


@pytest.fixture(scope="module")
def caller(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Running:
    """Answers SCRIPT to every chat, in DeepSeek-V4's form but for the mark that the toy wants: it
    counts from there, and "</think>" is eight bytes."""
    folder = tmp_path_factory.mktemp("models") / "caller"
    path: Path = write_toy_checkpoint(folder, script="-" * 8 + SCRIPT)
    template = BUILT_IN["deepseek_v4"].replace("<\uff5cAssistant\uff5c>", "<|assistant|>")
    config = json.loads((path / "tokenizer_config.json").read_text())
    config["chat_template"] = template
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return launcher.start(path, "--platform", "toy")


def ask(server: Running, messages: Any = ASKED, **more: Any) -> Any:
    with server.openai() as client:
        return client.chat.completions.create(
            model=server.model, messages=messages, **{"max_tokens": 600, **more}
        )


def called(calls: Any) -> list[tuple[str, Any]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in calls]


def test_calls_come_as_calls(caller: Running) -> None:
    (choice,) = ask(caller, tools=TOOLS).choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", SAID)
    assert called(choice.message.tool_calls) == WANTED
    ids = {call.id for call in choice.message.tool_calls}
    assert len(ids) == 2
    assert all(name.startswith("call_") for name in ids)


def test_a_stream_has_the_text_then_each_call_once(caller: Running) -> None:
    with caller.openai() as client:
        chunks = list(
            client.chat.completions.create(
                model=caller.model, messages=ASKED, tools=TOOLS, max_tokens=600, stream=True, n=2
            )
        )
    for index in range(2):
        choices = [c for chunk in chunks for c in chunk.choices if c.index == index]
        assert "".join(c.delta.content or "" for c in choices) == SAID
        calls = [call for c in choices for call in c.delta.tool_calls or []]
        assert [call.index for call in calls] == [0, 1]
        assert called(calls) == WANTED
        assert [c.finish_reason for c in choices if c.finish_reason] == ["tool_calls"]


@pytest.mark.parametrize(
    "more", [{}, {"tools": []}, {"tools": TOOLS, "tool_choice": "none"}], ids=str
)
def test_nothing_is_a_call_where_none_was_offered(caller: Running, more: dict[str, Any]) -> None:
    (choice,) = ask(caller, **more).choices
    assert (choice.finish_reason, choice.message.content) == ("stop", SCRIPT)
    assert choice.message.tool_calls is None


def test_a_call_that_was_cut_off_is_text(caller: Running) -> None:
    (choice,) = ask(caller, tools=TOOLS, max_tokens=60).choices
    assert choice.finish_reason == "length"
    assert choice.message.content == SCRIPT.encode()[:60].decode()


def test_within_a_thought_nothing_is_a_call(caller: Running) -> None:
    thinking = {"extra_body": {"chat_template_kwargs": {"thinking": True}}}
    (choice,) = ask(caller, tools=TOOLS, **thinking).choices
    assert (choice.finish_reason, choice.message.content) == ("stop", "-" + SCRIPT)


def prompt_of(server: Running, messages: Any, **more: Any) -> str:
    answer = server.http.post("/tokenize", json={"messages": messages, **more})
    assert answer.status_code == 200, answer.text
    return bytes(t for t in answer.json()["tokens"] if t < 256).decode()


def test_functions_and_results_are_in_the_prompt(caller: Running) -> None:
    """The second call is answered first; results go in the order of the calls."""
    message = ask(caller, tools=TOOLS).choices[0].message.model_dump(exclude_none=True)
    ids = [call["id"] for call in message["tool_calls"]]
    results = [{"role": "tool", "tool_call_id": i, "content": f"of {i}"} for i in reversed(ids)]
    talk = [*ASKED, message, *results]
    text = prompt_of(caller, talk, tools=TOOLS)
    assert '{"name": "weather", "parameters": {"type": "object"' in text
    assert SCRIPT in text
    assert text.index(f"<tool_result>of {ids[0]}</tool_result>") < text.index(f"of {ids[1]}<")
    without = prompt_of(caller, talk)
    assert without == BEGIN + text[text.index("<\uff5cUser") :]
    assert ask(caller, talk, tools=TOOLS).usage.prompt_tokens > len(text)


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "required": ({"tools": TOOLS, "tool_choice": "required"}, "tool_choice"),
    "named": (
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "now"}}},
        "tool_choice",
    ),
    "one_at_a_time": ({"tools": TOOLS, "parallel_tool_calls": False}, "parallel_tool_calls"),
    "strict": (
        {"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]},
        "tools[0].function.strict",
    ),
    "no_name": ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
    "other_kind": ({"tools": [{"type": "custom", "custom": {}}]}, "tools[0].custom"),
    "result_without_call": (
        {"messages": [{"role": "tool", "content": "x"}]},
        "messages[0].tool_call_id",
    ),
    "call_by_user": (
        {"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]},
        "messages[0].tool_calls",
    ),
    "nothing_said": ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content"),
    "function_role": ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role"),
    "both": (
        {"tools": TOOLS, "chat_template_kwargs": {"tools": []}},
        "chat_template_kwargs",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_held_to_is_400(caller: Running, name: str) -> None:
    fields, param = WRONG[name]
    body = {"model": caller.model, "messages": ASKED, "max_tokens": 2, **fields}
    answer = caller.http.post("/v1/chat/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_a_model_without_calls_refuses_functions(scripted: Running) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(scripted, tools=TOOLS)
    assert (caught.value.param, caught.value.code) == ("tools", "unsupported_parameter")
    answer = scripted.http.post("/tokenize", json={"messages": ASKED, "tools": TOOLS})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")
