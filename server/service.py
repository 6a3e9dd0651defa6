"""What every route shares: the phase the server is in, the model's tokenizer, the engine client."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from .. import __version__
from ..common.checkpoint.tokenizer import Tokenizer
from ..common.errors import ContextLengthExceeded, RequestError
from ..common.messages import ErrorBody, Loading, Ready
from ..common.sampling import SamplingParams
from ..common.text.tool_calls import calls_in_template
from .engine_client import EngineClient
from .errors import ApiError, bad_request, engine_gone, unavailable
from .images import ImageReader, NoImages
from .metrics import Metrics

LONG_TEXT = 16_384
"""From this many characters on, tokenising runs in a thread so that streams go on meanwhile."""


class Phase(Enum):
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class HttpOptions:
    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = 32 * 2**20
    fetch_images: bool = False  # http and https URLs in image parts


@dataclass(slots=True)
class Loaded:
    """All that exists once the model is loaded."""

    client: EngineClient
    ready: Ready
    tokenizer: Tokenizer
    created: int  # unix seconds
    images: ImageReader | NoImages

    @property
    def tools(self) -> bool:
        """Whether the model's calls of functions can be asked for and read."""
        return calls_in_template(self.tokenizer.chat_template)


@dataclass(slots=True)
class Service:
    """Shared by all routes; changed only by `run.py`."""

    options: HttpOptions = field(default_factory=HttpOptions)
    metrics: Metrics = field(default_factory=Metrics)
    phase: Phase = Phase.LOADING
    model: str = ""  # the name under which the model is served; "" until it is known
    loading: Loading = field(default_factory=lambda: Loading(stage="starting"))
    _loaded: Loaded | None = None

    def open(self, loaded: Loaded) -> None:
        self._loaded = loaded
        self.phase = Phase.READY

    @property
    def loaded(self) -> Loaded:
        """Raises ApiError 503 unless requests can be served."""
        if self.phase is Phase.DEAD:
            raise engine_gone()
        if self.phase is Phase.DRAINING:
            raise unavailable("The server is shutting down.", "draining", 5)
        if self._loaded is None:
            raise unavailable(f"The model is loading: {self.progress}.", "loading", 2)
        if self._loaded.client.ended.is_set():
            raise engine_gone()
        return self._loaded

    @property
    def fingerprint(self) -> str:
        platform = self._loaded.ready.platform if self._loaded else "none"
        return f"sixfold-{__version__}-{platform}"

    @property
    def progress(self) -> str:
        now = self.loading
        return f"{now.stage} {now.percent} %" if now.total else now.stage

    def check_model(self, name: str | None) -> None:
        """Raises ApiError 404 for a model that is not the one served."""
        if name is not None and name != self.model:
            message = f"The model {name!r} does not exist here. Served: {self.model!r}."
            body = ErrorBody(message, "invalid_request_error", "model", "model_not_found", 404)
            raise ApiError(body)


_FEATURES: dict[str, tuple[str, object]] = {
    "logprobs": ("logprobs", None),
    "prompt_logprobs": ("prompt_logprobs", None),
    "logit_bias": ("logit_bias", {}),
    "top_k": ("top_k", 0),
    "top_p": ("top_p", 1.0),
    "min_p": ("min_p", 0.0),
    "repetition_penalty": ("penalties", 1.0),
    "presence_penalty": ("penalties", 0.0),
    "frequency_penalty": ("penalties", 0.0),
}
"""Sampling field -> (the platform's feature that serves it, the value that asks for nothing)."""


def check_sampling(params: SamplingParams, ready: Ready) -> None:
    """Ranges, then what the platform can do. Raises RequestError or ApiError naming the field."""
    params.validate(ready.vocab_size, ready.max_logprobs)
    for name, (feature, neutral) in _FEATURES.items():
        status, reason = ready.features.get(feature, ["supported", ""])
        if status == "unsupported" and getattr(params, name) != neutral:
            raise bad_request(
                f"{name} is not supported on the platform {ready.platform!r}: {reason}.",
                name,
                "unsupported_parameter",
            )


def check_length(prompt: Sequence[int], params: SamplingParams, ready: Ready, param: str) -> None:
    """Nothing is ever cut: a prompt with its completion fits, or the request is refused."""
    if not prompt:
        raise bad_request(f"{param} has no tokens.", param, "invalid_value")
    # A completion of unstated length needs room for at least one token.
    if len(prompt) + (params.max_tokens or 1) > ready.max_context:
        raise ContextLengthExceeded(ready.max_context, len(prompt), params.max_tokens, param)


async def encode(tokenizer: Tokenizer, text: str, param: str, special: bool = True) -> list[int]:
    """Token ids of `text`. Raises ApiError for text that is no Unicode (lone surrogates) and
    RequestError for what the vocabulary cannot spell, naming `param`."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise bad_request(f"{param} is not valid Unicode text.", param, "invalid_value") from None
    try:
        if len(text) < LONG_TEXT:
            return tokenizer.encode(text, add_special_tokens=special)
        return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=special)
    except RequestError as error:
        error.param = param
        raise
