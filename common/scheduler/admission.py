"""What a request must satisfy before it may wait: a valid prompt, parameters that the platform can
honour, and lengths that fit the model and the cache."""

from __future__ import annotations

import numpy as np

from ...platforms.interface import ExecutorInfo, Status
from ...platforms.interface_kv import I32
from ..cache.kv_cache import KVCache
from ..errors import ContextLengthExceeded, RequestError
from ..messages import AddRequest
from ..sampling import SamplingParams

# Parameter -> names under which a platform may declare the feature; the first declared counts.
_FEATURES = {
    "temperature": ("temperature", "sampling"),
    "top_k": ("top_k", "sampling"),
    "top_p": ("top_p", "sampling"),
    "min_p": ("min_p", "sampling"),
    "repetition_penalty": ("repetition_penalty", "penalties"),
    "presence_penalty": ("presence_penalty", "penalties"),
    "frequency_penalty": ("frequency_penalty", "penalties"),
    "logit_bias": ("logit_bias",),
    "min_tokens": ("min_tokens", "logit_bias"),
    "logprobs": ("logprobs",),
    "prompt_logprobs": ("prompt_logprobs", "logprobs"),
}
_OFF = SamplingParams(temperature=0.0)  # every parameter at the value that asks for nothing


def check_prompt(request: AddRequest, info: ExecutorInfo) -> I32:
    """The prompt as int32 (P,). Raises RequestError."""
    if not request.prompt_ids:
        raise RequestError("The prompt must hold at least one token.", "prompt", "invalid_value")
    low, high = min(request.prompt_ids), max(request.prompt_ids)
    if low < 0 or high >= info.vocab_size:
        raise RequestError(
            f"The prompt holds token id {low if low < 0 else high}; ids must be in "
            f"0..{info.vocab_size - 1}.",
            "prompt",
            "invalid_value",
        )
    return np.array(request.prompt_ids, np.int32)


def check_params(params: SamplingParams, info: ExecutorInfo) -> None:
    """Raises RequestError for a value out of range, or one that this platform cannot honour."""
    params.validate(info.vocab_size, info.max_logprobs)
    for name, features in _FEATURES.items():
        if getattr(params, name) == getattr(_OFF, name):
            continue
        declared = [info.features[f] for f in features if f in info.features]
        if declared and declared[0].status is Status.NO:
            raise RequestError(
                f"Platform {info.device.kind!r} does not support {name}: {declared[0].reason} "
                f"Leave {name} out, or serve on another platform.",
                name,
                "unsupported_parameter",
            )


def check_lengths(request: AddRequest, info: ExecutorInfo, cache: KVCache) -> int:
    """The number of prompt and output tokens at which the request ends with "length".

    Raises ContextLengthExceeded, or RequestError when it could not run even alone in the cache.
    Without max_tokens the output may go up to the context limit, or to what the cache holds.
    """
    prompt, output = len(request.prompt_ids), request.params.max_tokens
    if prompt + (output or 1) > info.max_context:
        raise ContextLengthExceeded(info.max_context, prompt, output or 1)
    most = cache.capacity + 1  # the last token sampled is never computed
    if prompt + (output or 1) > most:
        raise RequestError(
            f"The request needs cache for {prompt + (output or 1) - 1} tokens ({prompt} in the "
            f"prompt), the whole cache holds {cache.capacity}. Shorten the prompt or max_tokens, "
            f"or start the server with a larger --cache-tokens.",
            "prompt" if prompt > cache.capacity else "max_tokens",
            "cache_too_small",
        )
    return min(info.max_context, most) if output is None else prompt + output
