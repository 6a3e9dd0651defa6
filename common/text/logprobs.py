"""Log-probabilities of tokens in the two forms that OpenAI's API knows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from ..messages import TokenLogprobs

LOWEST = -9999.0
"""JSON has no -inf; this is what clients of OpenAI's API get for an impossible token."""


class TokenNames(Protocol):
    def token_bytes(self, token_id: int) -> bytes: ...


@dataclass(frozen=True, slots=True)
class TokenEntry:
    """One token of the text: its own characters begin at `offset` of the text it belongs to."""

    token_id: int
    offset: int
    logprobs: TokenLogprobs | None = None


def token_name(data: bytes) -> str:
    """A token as text; one that is no whole UTF-8 is spelled `bytes:\\xf0\\x9f`, so that names of
    different tokens stay different."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _one(names: TokenNames, token_id: int, logprob: float) -> dict[str, Any]:
    data = names.token_bytes(token_id)
    return {"token": token_name(data), "logprob": max(logprob, LOWEST), "bytes": list(data)}


def chat_entry(names: TokenNames, logprobs: TokenLogprobs) -> dict[str, Any]:
    """One element of `choices[].logprobs.content`."""
    top = zip(logprobs.top_ids, logprobs.top_logprobs, strict=True)
    return _one(names, logprobs.token_id, logprobs.logprob) | {
        "top_logprobs": [_one(names, token_id, value) for token_id, value in top]
    }


def chat_logprobs(names: TokenNames, entries: Iterable[TokenEntry]) -> dict[str, Any]:
    """`choices[].logprobs` of a chat completion."""
    content = [chat_entry(names, e.logprobs) for e in entries if e.logprobs is not None]
    return {"content": content, "refusal": None}


def completion_logprobs(names: TokenNames, entries: Iterable[TokenEntry]) -> dict[str, Any]:
    """`choices[].logprobs` of a text completion. An entry without log-probability (the first token
    of an echoed prompt) holds null. The chosen token is among its own `top_logprobs`."""
    result: dict[str, list[Any]] = {
        "tokens": [],
        "token_logprobs": [],
        "top_logprobs": [],
        "text_offset": [],
    }
    for entry in entries:
        name = token_name(names.token_bytes(entry.token_id))
        result["tokens"].append(name)
        result["text_offset"].append(entry.offset)
        if entry.logprobs is None:
            result["token_logprobs"].append(None)
            result["top_logprobs"].append(None)
            continue
        given = entry.logprobs
        chosen = max(given.logprob, LOWEST)
        top = {
            token_name(names.token_bytes(token_id)): max(value, LOWEST)
            for token_id, value in zip(given.top_ids, given.top_logprobs, strict=True)
        }
        result["token_logprobs"].append(chosen)
        result["top_logprobs"].append({**top, name: chosen})
    return result
