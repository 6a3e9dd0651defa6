"""Guards the chat templates of families whose checkpoints have none: the text that the model was
trained on, character by character, and refusals of what a template does not render."""

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


@pytest.mark.parametrize(
    ("messages", "variables"),
    [
        ((say("tool", "4"),), {}),
        ((say("developer", "x"),), {}),
        ((say("user", "x"),), {"tools": [{"type": "function"}]}),
        ((say("user", "x"),), {"reasoning_effort": "max"}),
    ],
)
def test_what_it_does_not_render_is_refused(messages: Any, variables: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="chat template refuses"):
        render(*messages, **variables)
    assert render(say("user", "x"), reasoning_effort="high")


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
