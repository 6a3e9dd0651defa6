"""Contract guarded: every error is {"error": {message, type, param, code}} with the right status
and names the parameter; nothing asked for is cut, capped or ignored."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from serving import Launcher, Running

MESSAGES = [{"role": "user", "content": "Hi"}]


def error(response: Any, status: int) -> dict[str, Any]:
    """The error object, after checking its shape."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert list(body) == ["error"]
    assert sorted(body["error"]) == ["code", "message", "param", "type"]
    assert body["error"]["message"].endswith(".")
    assert "Traceback" not in response.text
    found: dict[str, Any] = body["error"]
    return found


def post_chat(server: Running, **fields: Any) -> Any:
    body = {"model": server.model, "messages": MESSAGES, "max_tokens": 2, **fields}
    body = {name: value for name, value in body.items() if value is not ...}
    return server.http.post("/v1/chat/completions", json=body)


def post_completion(server: Running, **fields: Any) -> Any:
    body = {"model": server.model, "prompt": "Hi", "max_tokens": 2, **fields}
    return server.http.post("/v1/completions", json=body)


UNSUPPORTED_CHAT = {
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "required",
    "functions": [{"name": "f"}],
    "function_call": {"name": "f"},
    "response_format": {"type": "json_object"},
    "audio": {"voice": "alloy", "format": "wav"},
    "modalities": ["text", "audio"],
    "prediction": {"type": "content", "content": "x"},
    "reasoning_effort": "high",
    "service_tier": "priority",
    "store": True,
    "verbosity": "low",
    "web_search_options": {},
    "prompt_cache_retention": "24h",
}


@pytest.mark.parametrize("name", sorted(UNSUPPORTED_CHAT))
def test_known_but_unsupported_is_refused_with_its_name(
    server: Running, platform: str, name: str
) -> None:
    found = error(post_chat(server, **{name: UNSUPPORTED_CHAT[name]}), 400)
    assert found["param"] == name
    assert found["code"] == "unsupported_parameter"
    assert name in found["message"]
    assert repr(platform) in found["message"]


def test_neutral_values_of_unsupported_fields_pass(server: Running) -> None:
    neutral = {
        "tools": [], "tool_choice": "none", "functions": None, "function_call": "auto",
        "response_format": {"type": "text"}, "audio": None, "modalities": ["text"],
        "parallel_tool_calls": True, "prediction": None, "reasoning_effort": None,
        "service_tier": "auto", "store": False, "verbosity": None, "web_search_options": None,
        "user": "me", "metadata": {"a": "b"}, "safety_identifier": "x", "prompt_cache_key": "k",
        "logit_bias": None, "stop": None, "n": None, "stream_options": None, "seed": None,
        "logprobs": False, "top_logprobs": None, "temperature": None,
    }  # fmt: skip
    assert post_chat(server, **neutral).status_code == 200
    assert post_completion(server, suffix=None, best_of=1, echo=False).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"temprature": 1}, "temprature", "unknown_parameter"),
        ({"messages": ...}, "messages", "missing_parameter"),
        ({"model": ...}, "model", "missing_parameter"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": "Hi"}, "messages", "invalid_value"),
        ({"messages": ["Hi"]}, "messages[0]", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_parameter"),
        (
            {"messages": [{"role": "boss", "content": "x"}]},
            "messages[0].role",
            "invalid_value",
        ),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            "messages[0].role",
            "unsupported_value",
        ),
        (
            {"messages": [*MESSAGES, {"role": "user", "content": "x", "mood": 1}]},
            "messages[1].mood",
            "unknown_parameter",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]},
            "messages[0].tool_calls",
            "unsupported_parameter",
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image_url", "image_url": {"url": "data:"}}],
                    }
                ]
            },
            "messages[0].content[0].type",
            "unsupported_value",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "txt": "x"}]}]},
            "messages[0].content[0].txt",
            "unknown_parameter",
        ),
        ({"temperature": "hot"}, "temperature", "invalid_value"),
        ({"temperature": -0.1}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"top_k": -1}, "top_k", "invalid_value"),
        ({"min_p": 2}, "min_p", "invalid_value"),
        ({"frequency_penalty": 3}, "frequency_penalty", "invalid_value"),
        ({"presence_penalty": -3}, "presence_penalty", "invalid_value"),
        ({"repetition_penalty": 0}, "repetition_penalty", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": 1.5}, "max_tokens", "invalid_value"),
        ({"max_tokens": True}, "max_tokens", "invalid_value"),
        ({"max_tokens": 2, "max_completion_tokens": 3}, "max_tokens", "invalid_value"),
        ({"min_tokens": 3}, "min_tokens", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 129}, "n", "invalid_value"),
        ({"seed": 2**63}, "seed", "invalid_value"),
        ({"stop": ""}, "stop", "invalid_value"),
        ({"stop": ["a"] * 17}, "stop", "invalid_value"),
        ({"stop": 3}, "stop", "invalid_value"),
        ({"stop_token_ids": [-1]}, "stop_token_ids", "invalid_value"),
        ({"stop_token_ids": [10**8]}, "stop_token_ids", "invalid_value"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias", "invalid_value"),
        ({"logprobs": 2}, "logprobs", "invalid_value"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 999}, "logprobs", "invalid_value"),
        ({"stream": "yes"}, "stream", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        (
            {"stream": True, "stream_options": {"inclde_usage": True}},
            "stream_options.inclde_usage",
            "unknown_parameter",
        ),
        (
            {"chat_template_kwargs": {"messages": []}},
            "chat_template_kwargs",
            "invalid_value",
        ),
        ({"priority": 2**40}, "priority", "invalid_value"),
    ],
)
def test_a_wrong_field_is_400_and_named(
    server: Running, fields: dict[str, Any], param: str, code: str
) -> None:
    found = error(post_chat(server, **fields), 400)
    assert (found["param"], found["code"]) == (param, code), found["message"]
    assert found["type"] == "invalid_request_error"
    assert param.rpartition(".")[2].split("[")[0] in found["message"]


def test_image_parts_name_the_model(server: Running) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:"}}
    found = error(post_chat(server, messages=[{"role": "user", "content": [part]}]), 400)
    assert repr(server.model) in found["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt[1]"),
        ({"prompt": [1, -1]}, "prompt"),
        ({"prompt": ["fine", ""]}, "prompt[1]"),
        ({"prompt": [[1], [10**8]]}, "prompt[1]"),
        ({"prompt": None}, "prompt"),
        ({"logprobs": 999}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": MESSAGES}, "messages"),
        ({"top_logprobs": 2}, "top_logprobs"),
    ],
)
def test_wrong_completion_fields(
    server: Running, platform: str, fields: dict[str, Any], param: str
) -> None:
    if platform != "toy" and "" in (fields.get("prompt") or ()):
        pytest.skip("a vocabulary with BOS makes a token of the empty prompt")
    assert error(post_completion(server, **fields), 400)["param"] == param


def test_nothing_is_cut(server: Running) -> None:
    limit = server.http.get("/v1/platform").json()["max_context"]
    sentence = f"maximum context length is {limit} tokens"
    long = error(post_completion(server, prompt=[65] * limit, max_tokens=1), 400)
    assert (long["param"], long["code"]) == ("prompt", "context_length_exceeded")
    assert sentence in long["message"]
    for name in ("max_tokens", "max_completion_tokens"):
        other = {"max_tokens": ...} if name != "max_tokens" else {}
        far = error(post_chat(server, **{**other, name: limit}), 400)
        assert (far["param"], far["code"]) == ("messages", "context_length_exceeded")
        assert sentence in far["message"]
    assert post_completion(server, prompt=[65] * (limit - 1), max_tokens=1).status_code == 200


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b'{"model": "\xff\xfe"}', "invalid_utf8"),
        (b"{not json", "invalid_json"),
        (b"", "invalid_json"),
        (b"[1, 2]", "invalid_json"),
        (b'{"temperature": NaN}', "invalid_json"),
        (b'{"temperature": 1e999}', "invalid_json"),
        (b'{"a": ' + b"[" * 100_000, "invalid_json"),
        (b'{"messages": "\\ud800"}', "invalid_json"),
        (b"\x00\x01\x02", "invalid_json"),
    ],
)
def test_unreadable_bodies(server: Running, content: bytes, code: str) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
        response = server.http.post(
            path, content=content, headers={"Content-Type": "application/json"}
        )
        assert error(response, 400)["code"] == code


def test_other_media_types_are_415(server: Running) -> None:
    for headers in (
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/json; charset=latin-1"},
        {"Content-Type": "application/json", "Content-Encoding": "gzip"},
    ):
        response = server.http.post("/v1/completions", content=b"{}", headers=headers)
        assert error(response, 415)["code"] == "unsupported_media_type"


def test_unknown_path_method_and_model(server: Running) -> None:
    assert error(server.http.get("/v1/nothing"), 404)["code"] == "not_found"
    assert error(server.http.post("/"), 405)["code"] == "method_not_allowed"
    wrong = server.http.get("/v1/chat/completions")
    assert error(wrong, 405)["message"].startswith("GET is not possible on /v1/chat/completions")
    assert wrong.headers["allow"] == "POST"
    for response in (
        server.http.get("/v1/models/gpt-99"),
        post_chat(server, model="gpt-99"),
        server.http.post("/tokenize", json={"model": "gpt-99", "prompt": "x"}),
    ):
        found = error(response, 404)
        assert (found["param"], found["code"]) == ("model", "model_not_found")
        assert repr(server.model) in found["message"]


def test_request_ids(server: Running) -> None:
    def sent_back(given: str) -> str:
        answer = server.http.get("/health", headers={"X-Request-Id": given})
        return str(answer.headers["x-request-id"])

    assert sent_back("my-id.1") == "my-id.1"
    for insane in ("", "a b", "x" * 200, "<script>"):
        assert sent_back(insane) != insane
    ids = {server.http.get("/health").headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3


def test_tokenize_and_detokenize(server: Running) -> None:
    text = "Grüße, 世界!"
    found = server.http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    plain = {"prompt": text, "add_special_tokens": False}
    ids = server.http.post("/tokenize", json=plain).json()["tokens"]
    back = server.http.post("/detokenize", json={"tokens": ids})
    assert back.json() == {"prompt": text}
    chat = server.http.post("/tokenize", json={"messages": MESSAGES}).json()
    answer = post_chat(server).json()
    assert chat["count"] == answer["usage"]["prompt_tokens"]
    for body in ({}, {"prompt": "x", "messages": MESSAGES}):
        assert error(server.http.post("/tokenize", json=body), 400)["param"] == "prompt"
    assert error(server.http.post("/detokenize", json={"tokens": [-1]}), 400)["param"] == "tokens"


def raw(server: Running, data: bytes) -> tuple[bytes, Any]:
    """Send bytes, read until the server closes; status line and JSON body."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 30) as connection:
        connection.sendall(data)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    return head.split(b"\r\n")[0], json.loads(body)


def test_bytes_that_are_no_http(server: Running) -> None:
    for data in (b"\x16\x03\x01\x02\x00\x01\x00", b"NONSENSE\r\n\r\n", b"GET / HTTP/9\r\n\r\n"):
        status, body = raw(server, data)
        assert status == b"HTTP/1.1 400 Bad Request"
        assert body["error"]["code"] == "invalid_http"


def test_too_large_with_and_without_a_length(launcher: Launcher, few_rows: list[str]) -> None:
    server = launcher.start(*few_rows, "--max-body-bytes", 2000)
    found = error(post_chat(server, messages=[{"role": "user", "content": "x" * 3000}]), 413)
    assert found["code"] == "request_too_large"

    def stream() -> Any:
        for _ in range(30):
            yield b" " * 100

    response = server.http.post(
        "/v1/completions", content=stream(), headers={"Content-Type": "application/json"}
    )
    assert error(response, 413)["code"] == "request_too_large"
    assert post_chat(server).status_code == 200
    server.terminate()
    assert server.exit_code() == 0


def test_api_key_and_template_and_name(
    launcher: Launcher, few_rows: list[str], tmp_path: Path
) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}{{ extra }}")
    server = launcher.start(
        *few_rows, "--api-key", "one", "--api-key", "zwei-ü",
        "--chat-template", template, "--served-model-name", "my/model",
    )  # fmt: skip
    http = server.http
    for path in ("/v1/models", "/metrics", "/v1/platform", "/nothing"):
        for value in (None, "Bearer", "Bearer wrong", "Basic one", "one"):
            headers = {"Authorization": value} if value else {}
            response = http.get(path, headers=headers)
            found = error(response, 401)
            assert (found["type"], found["code"]) == ("authentication_error", "invalid_api_key")
            assert response.headers["www-authenticate"] == "Bearer"
    for path in ("/", "/health", "/ready"):
        assert http.get(path).status_code == 200
    for key in ("one", "zwei-ü"):
        authorised = {b"Authorization": f"Bearer {key}".encode()}
        models = http.get("/v1/models", headers=authorised).json()
        assert [model["id"] for model in models["data"]] == ["my/model"]
    counts = http.post(
        "/tokenize",
        json={"messages": MESSAGES, "chat_template_kwargs": {"extra": "!"}},
        headers={"Authorization": "Bearer one"},
    ).json()
    plain = http.post(
        "/tokenize",
        json={"prompt": "Hi!", "add_special_tokens": False},
        headers={"Authorization": "Bearer one"},
    ).json()
    assert counts["tokens"] == plain["tokens"]
    server.terminate()
    assert server.exit_code() == 0


def test_page_is_self_contained(server: Running) -> None:
    page = server.http.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "http://" not in page.text
    assert "https://" not in page.text
    assert " src=" not in page.text


def test_platform_report(server: Running, platform: str) -> None:
    report = server.http.get("/v1/platform").json()
    assert report["platform"] == platform
    decisions = {decision["what"]: decision for decision in report["decisions"]}
    assert {"model", "platform", "max rows", "overlap"} <= set(decisions)
    assert all(decision["because"] for decision in report["decisions"])
    assert report["groups"]
    assert all(value["status"] for value in report["features"].values())
