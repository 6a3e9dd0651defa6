"""Guards the chat templates of families whose checkpoints have none: which text and which mark
stands where, character by character, and refusals of what a template does not render."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.toy_checkpoint import write_toy_checkpoint

from sixfold.common.checkpoint.built_in_templates import BUILT_IN
from sixfold.common.checkpoint.chat_template import ChatTemplate
from sixfold.common.checkpoint.checkpoint import open_checkpoint
from sixfold.common.checkpoint.tokenizer import load_tokenizer
from sixfold.common.errors import RequestError

BEGIN, END = "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"
USER, ASSISTANT = "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"


def say(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def render(*messages: dict[str, Any], prompt: bool = True, **variables: Any) -> str:
    template = ChatTemplate({"default": BUILT_IN["deepseek_v4"]}, {})
    return template.render(messages, prompt, **variables)


TALK = (
    say("system", "Be brief. "),
    say("user", "One?"),
    say("assistant", "1", reasoning_content="It is one."),
    say("user", " Two?\n"),
)


def test_one_question() -> None:
    assert render(say("user", "Hi")) == f"{BEGIN}{USER}Hi{ASSISTANT}</think>"
    assert render(say("user", "Hi"), thinking=True) == f"{BEGIN}{USER}Hi{ASSISTANT}<think>"
    assert render(say("user", "Hi"), prompt=False) == f"{BEGIN}{USER}Hi"


def test_a_talk_keeps_its_text_and_drops_earlier_thoughts() -> None:
    before = f"{BEGIN}Be brief. {USER}One?{ASSISTANT}</think>1{END}{USER} Two?\n{ASSISTANT}"
    assert render(*TALK) == f"{before}</think>"
    assert render(*TALK, thinking=True) == f"{before}<think>"


def test_thoughts_behind_the_last_question_are_kept() -> None:
    talk = (say("user", "One?"), say("assistant", "1", reasoning_content="Easy."))
    assert render(*talk, thinking=True) == f"{BEGIN}{USER}One?{ASSISTANT}<think>Easy.</think>1{END}"
    assert render(*talk) == f"{BEGIN}{USER}One?{ASSISTANT}</think>1{END}"


def test_questions_that_follow_each_other_are_one_turn() -> None:
    found = render(say("user", "A"), say("user", "B"))
    assert found == f"{BEGIN}{USER}A\n\nB{ASSISTANT}</think>"


def test_a_developer_speaks_in_the_turn_of_the_user() -> None:
    found = render(say("developer", "Briefly."), say("user", "Hi"))
    assert found == f"{BEGIN}{USER}Briefly.\n\nHi{ASSISTANT}</think>"


DEVELOPED = (say("developer", "Old."), say("user", "One?"), say("assistant", "1"))


def test_earlier_developers_go_with_earlier_thoughts() -> None:
    now = (say("developer", "New."), say("user", "Two?"))
    kept = f"{BEGIN}{USER}Old.\n\nOne?{ASSISTANT}</think>1{END}{USER}New.\n\nTwo?{ASSISTANT}"
    assert render(*DEVELOPED, *now) == f"{kept}</think>"
    dropped = f"{BEGIN}{USER}One?{ASSISTANT}</think>1{END}{USER}Two?{ASSISTANT}<think>"
    assert render(*DEVELOPED, *now, thinking=True) == dropped


def test_the_most_effort_is_asked_for_before_everything_else() -> None:
    hi = say("user", "Hi")
    plain = render(say("system", "Be kind."), hi, thinking=True)
    most = render(say("system", "Be kind."), hi, thinking=True, reasoning_effort="max")
    paragraph = most.removeprefix(BEGIN).removesuffix(plain.removeprefix(BEGIN))
    assert most == BEGIN + paragraph + plain.removeprefix(BEGIN)
    assert paragraph.startswith("Reasoning effort: max.")
    assert paragraph.endswith("\n\n")
    assert render(hi, reasoning_effort="max") == render(hi)  # nothing is thought there
    for effort in ("high", None):
        assert render(hi, thinking=True, reasoning_effort=effort) == render(hi, thinking=True)


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"ä": [1]}}}]
OTHER = [{"type": "function", "function": {"name": "g"}}]


def section(found: str) -> str:
    """The text between BEGIN and the first mark behind it."""
    return found.removeprefix(BEGIN).partition("<\uff5cUser")[0]


def test_functions_stand_behind_the_systems_text() -> None:
    found = section(render(say("system", "Be kind."), say("user", "Hi"), tools=TOOLS))
    assert found.startswith("Be kind.\n\n## Tools\n\n")
    assert found.endswith('\n{"name": "f", "parameters": {"ä": [1]}}')
    alone = section(render(say("user", "Hi"), tools=TOOLS))
    assert "Be kind." + alone == found
    own = section(render(say("system", "Be kind.", tools=TOOLS), say("user", "Hi")))
    assert own == found


def test_functions_are_described_once() -> None:
    talk = (say("system", "A"), say("user", "x"), say("system", "B"), say("user", "y"))
    assert render(*talk, tools=TOOLS).count("## Tools") == 1


def test_a_developer_may_bring_functions() -> None:
    found = render(say("developer", "Use g.", tools=OTHER), say("user", "Hi"))
    described = section(render(say("user", "Hi"), tools=OTHER))
    assert found == f"{BEGIN}{USER}Use g.{described}\n\nHi{ASSISTANT}</think>"


def call(name: str, number: str, arguments: Any) -> dict[str, Any]:
    return {"id": number, "function": {"name": name, "arguments": arguments}}


def result(number: str, text: str) -> dict[str, Any]:
    return say("tool", text, tool_call_id=number)


D = "\uff5cDSML\uff5c"
CALLS = [call("f", "a", {"x": "<1>", "y": [2, "ä"]}), call("g", "b", {})]
CALLED = (
    f'\n\n<{D}tool_calls>\n<{D}invoke name="f">\n'
    f'<{D}parameter name="x" string="true"><1></{D}parameter>\n'
    f'<{D}parameter name="y" string="false">[2, "ä"]</{D}parameter>\n</{D}invoke>\n'
    f'<{D}invoke name="g">\n</{D}invoke>\n</{D}tool_calls>'
)


def test_calls_and_results() -> None:
    """Results in the order of the calls, those of no call behind them; then the user goes on."""
    talk = (
        say("user", "Hi"),
        say("assistant", "So:", tool_calls=CALLS),
        result("b", "of g"),
        result("?", "of none"),
        result("a", "of f"),
        say("user", "And?"),
    )
    results = "\n\n".join(f"<tool_result>of {name}</tool_result>" for name in ("f", "g", "none"))
    assert render(*talk) == (
        f"{BEGIN}{USER}Hi{ASSISTANT}</think>So:{CALLED}{END}{USER}{results}\n\nAnd?{ASSISTANT}</think>"
    )


def test_all_thoughts_are_kept_where_functions_are_defined() -> None:
    talk = (
        say("user", "Hi"),
        say("assistant", "", reasoning_content="Hm.", tool_calls=CALLS),
        result("a", "1"),
        say("assistant", "It is 1.", reasoning_content="Good."),
        say("user", "Sure?"),
    )
    wanted = (
        f"{USER}Hi{ASSISTANT}<think>Hm.</think>{CALLED}{END}{USER}<tool_result>1</tool_result>"
        f"{ASSISTANT}<think>Good.</think>It is 1.{END}{USER}Sure?{ASSISTANT}<think>"
    )
    assert render(*talk, thinking=True, tools=TOOLS).partition(USER)[2] == wanted.partition(USER)[2]
    assert "Hm." not in render(*talk, thinking=True)
    assert "Good." not in render(*talk, tools=TOOLS)
    by_developer = (say("developer", "x", tools=OTHER), *talk)
    assert "Hm." in (found := render(*by_developer, thinking=True))
    assert f"{USER}x\n\n## Tools" in found


def test_arguments_that_are_no_object_are_one_parameter() -> None:
    talk = (say("user", "Hi"), say("assistant", "", tool_calls=[call("f", "a", "[1")]))
    parameter = f'<{D}parameter name="arguments" string="true">[1</{D}parameter>'
    assert parameter in render(*talk, prompt=False)


@pytest.mark.parametrize(
    ("messages", "variables"),
    [
        ((say("critic", "x"),), {}),
        ((say("system", "x", response_format={"type": "object"}),), {}),
        ((say("user", "x"),), {"reasoning_effort": "low"}),
    ],
)
def test_what_it_does_not_render_is_refused(messages: Any, variables: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="chat template refuses"):
        render(*messages, **variables)


@pytest.mark.parametrize("own", [True, False])
def test_a_directorys_own_template_comes_first(tmp_path: Path, own: bool) -> None:
    path = write_toy_checkpoint(tmp_path)
    config = json.loads((path / "config.json").read_text()) | {"model_type": "deepseek_v4"}
    (path / "config.json").write_text(json.dumps(config))
    if not own:
        (path / "tokenizer_config.json").write_text("{}")
    tokenizer = load_tokenizer(open_checkpoint(path))
    found = tokenizer.apply_chat_template([say("user", "Hi")])
    assert (USER in found) == (not own)
