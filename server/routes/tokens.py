"""POST /tokenize and /detokenize: the model's tokenizer, exactly as the engine uses it."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from ...common.text.logprobs import token_name
from ..errors import bad_request
from ..protocol import DetokenizeRequest, TokenizeRequest, strip_messages, strip_neutral
from ..reading import checked, parse_json, read_body
from ..responses import json_response
from ..service import Service, encode
from .chat import chat_prompt
from .completions import check_ids


async def tokenize(request: Request) -> Response:
    service: Service = request.app.state.service
    fields = parse_json(await read_body(request, service.options.max_body_bytes))
    loaded = service.loaded
    platform = loaded.ready.platform
    if not loaded.tools:
        fields = strip_neutral(fields, {"tools": (None, [])}, frozenset(), platform)
    if "messages" in fields:
        fields["messages"] = strip_messages(
            fields["messages"], platform, service.model, loaded.images, loaded.tools
        )
    body = checked(TokenizeRequest, fields)
    service.check_model(body.model)
    tokenizer = loaded.tokenizer
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("Send either prompt or messages.", "prompt", "invalid_value")
    if body.messages is not None:
        ids = (await chat_prompt(loaded, body, bool(body.add_special_tokens))).ids
    else:
        special = body.add_special_tokens is not False
        ids = await encode(tokenizer, body.prompt or "", "prompt", special)
    answer = {"count": len(ids), "max_model_len": loaded.ready.max_context, "tokens": ids}
    if body.return_token_strs:
        answer["token_strs"] = [token_name(tokenizer.token_bytes(i)) for i in ids]
    return json_response(answer)


async def detokenize(request: Request) -> Response:
    service: Service = request.app.state.service
    fields = parse_json(await read_body(request, service.options.max_body_bytes))
    loaded = service.loaded
    body = checked(DetokenizeRequest, fields)
    service.check_model(body.model)
    check_ids(body.tokens, loaded.ready, "tokens")
    return json_response({"prompt": loaded.tokenizer.decode(body.tokens, False)})
