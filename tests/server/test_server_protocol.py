"""Contract guarded: server/protocol decides every request field that OpenAI's client knows, and the
error that names a field names the right one."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types import completion_create_params as text_params
from openai.types.chat import completion_create_params as chat_params

from sixfold.common.errors import RequestError
from sixfold.server.errors import ApiError
from sixfold.server.protocol import (
    ACCEPTED,
    REFUSED_CHAT,
    REFUSED_COMPLETION,
    ChatRequest,
    CompletionRequest,
    Sampled,
    strip_neutral,
)
from sixfold.server.reading import checked, parse_json

EXTRAS = set(
    "top_k min_p repetition_penalty min_tokens ignore_eos stop_token_ids prompt_logprobs "
    "include_stop_str_in_output priority add_generation_prompt chat_template_kwargs".split()
)


@pytest.mark.parametrize(
    ("params", "model", "refused"),
    [
        (chat_params.CompletionCreateParamsBase, ChatRequest, REFUSED_CHAT),
        (text_params.CompletionCreateParamsBase, CompletionRequest, REFUSED_COMPLETION),
    ],
)
def test_every_field_of_the_client_is_decided_once(
    params: Any, model: type[Sampled], refused: dict[str, Any]
) -> None:
    known = {name for base in params.__mro__ for name in getattr(base, "__annotations__", ())}
    known |= {"stream"}
    served = set(model.model_fields)
    missing = known - served - set(refused) - ACCEPTED
    assert missing == set(), "OpenAI has fields that the table does not decide"
    # `tools` is served where the model calls functions, and refused elsewhere.
    assert served & set(refused) == ({"tools"} if model is ChatRequest else set())
    assert served & ACCEPTED == set()
    assert served - known - EXTRAS == set(), "a field that is neither OpenAI's nor listed as ours"
    assert all(None in neutral for neutral in refused.values())


def test_neutral_values_compare_by_type() -> None:
    for value in (0, 0.0, "", []):
        with pytest.raises(RequestError) as refused:
            strip_neutral({"store": value}, REFUSED_CHAT, ACCEPTED, "toy")
        assert refused.value.param == "store"
    fields = {"store": False, "user": 3, "seed": 1}
    assert strip_neutral(fields, REFUSED_CHAT, ACCEPTED, "toy") == {"seed": 1}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stop": [1]}, "stop[0]"),
        ({"stop": {"a": 1}}, "stop"),
        ({"prompt": [[1, "a"]]}, "prompt[0][1]"),
        ({"prompt": [["a"]]}, "prompt[0][0]"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"logit_bias": {"5": "x"}}, "logit_bias.5"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"stream": True, "stream_options": {"x": 1, "y": 2}}, "stream_options.x"),
        ({"n": None, "seed": 1.0}, "seed"),
    ],
)
def test_the_deepest_meant_field_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as wrong:
        checked(CompletionRequest, {"model": "m", "prompt": "x", **fields})
    assert wrong.value.body.param == param
    assert param in wrong.value.body.message
    assert wrong.value.body.message.endswith(".")


def test_messages_for_people_are_short() -> None:
    with pytest.raises(ApiError) as wrong:
        checked(CompletionRequest, {"model": "m", "prompt": "x", "temperature": "y" * 1000})
    assert len(str(wrong.value)) < 200


def test_json_numbers_keep_their_kind() -> None:
    assert parse_json(b'{"a": 1, "b": 1.0}') == {"a": 1, "b": 1.0}
    body = parse_json(b'{"model": "m", "prompt": "x", "temperature": 1}')
    assert checked(CompletionRequest, body).temperature == 1.0
