"""Messages between the front end (HTTP, text) and the engine process: msgspec over ZeroMQ."""

from __future__ import annotations

from typing import Any

import msgspec

from ..platforms.interface import ImageInput
from .sampling import SamplingParams


class Message(msgspec.Struct, kw_only=True, tag=True):
    """Base: every message is a tagged struct, not changed after it is made."""


# ---- front end -> engine


class Image(msgspec.Struct, frozen=True):
    """An image of a prompt, cut into patches (`common/images/patches.py`)."""

    start: int  # place of its first placeholder token in the prompt
    grid: tuple[int, int, int]  # patches: frames, down, across
    patches: bytes  # float32, frames * down * across rows
    digest: bytes  # of patches and grid: 32 bytes


class AddRequest(Message):
    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    priority: int = 0  # larger runs first
    images: list[Image] = []  # in order of the prompt


class Abort(Message):
    request_ids: list[str]


class Drain(Message):
    """Refuse new requests, finish the running ones, then answer Drained and exit."""


class Shutdown(Message):
    """Stop now; open requests end with an error."""


# ---- engine -> front end


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Log-probability of one token and the best alternatives, natural log of raw probabilities."""

    token_id: int
    logprob: float
    top_ids: list[int] = []
    top_logprobs: list[float] = []


class Output(Message):
    """New tokens of one request. `finish_reason` is None until its last message:
    "stop" (EOS or stop token; not among token_ids), "length", "abort" or "error"."""

    request_id: str
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None  # one per token id, when asked for
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # once, complete; first entry None
    finish_reason: str | None = None
    stop_token_id: int | None = None  # the token that ended it, for finish_reason "stop"
    cached_tokens: int | None = (
        None  # prompt tokens served from the prefix tree; in the first message
    )
    error: ErrorBody | None = None  # with finish_reason "error"


class ErrorBody(msgspec.Struct, frozen=True):
    message: str
    type: str = "server_error"
    param: str | None = None
    code: str | None = None
    status: int = 500
    retry_after: int | None = None


class Outputs(Message):
    """All that one step delivers."""

    outputs: list[Output]


class EngineStats(Message):
    """A load snapshot, sent about once a second while anything runs and once when idle begins.
    Counters only grow; derived figures (rates, fractions) are for the reader to compute."""

    waiting: int
    running: int
    pages: dict[str, list[int]]  # group -> [free, evictable, pinned, total], of pages or slots
    steps: int
    prompt_tokens: int  # computed, without cached ones
    cached_tokens: int
    output_tokens: int
    preemptions: int
    finished: dict[str, int]  # finish reason -> count
    step_seconds: float
    device_seconds: float
    drafted_tokens: int = 0  # guessed and verified
    accepted_drafts: int = 0  # of these, the ones that were right


class Loading(Message):
    """How far a start has come. 0 of 0: a stage that does not say."""

    stage: str
    done: int = 0
    total: int = 0

    @property
    def percent(self) -> int:
        return 100 * self.done // self.total if self.total else 0


class Ready(Message):
    """The engine can serve. Everything the front end must know about model and platform."""

    platform: str
    vocab_size: int
    max_context: int
    max_logprobs: int
    page_size: int
    max_queue: int
    features: dict[str, list[str]]  # feature -> [status, reason]
    decisions: list[dict[str, Any]]  # Decision records, in order
    groups: dict[str, dict[str, Any]]
    weight_bytes: int
    cache_bytes: int
    images: ImageInput | None = None


class Failed(Message):
    """The engine could not start or has died; `message` is for the user."""

    message: str


class Drained(Message):
    pass


ToEngine = AddRequest | Abort | Drain | Shutdown
FromEngine = Outputs | EngineStats | Loading | Ready | Failed | Drained

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
