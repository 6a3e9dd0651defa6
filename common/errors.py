"""Typed errors. Each carries the sentence that the user sees and what to do next."""

from __future__ import annotations


class SixfoldError(Exception):
    """Base of every error that is shown to a user as one message, without a traceback."""


class ConfigError(SixfoldError):
    """A flag or field has a value that cannot be honoured."""


class PlatformError(SixfoldError):
    """No platform can serve, or the one named cannot."""


class KernelError(SixfoldError):
    """A named kernel does not qualify, or strict mode refuses a generic one."""


class ConformanceError(SixfoldError):
    """A kernel broke a rule of its contract that no comparison of results shows."""


class CheckpointError(SixfoldError):
    """A model file is missing, broken or unsupported: names the file and the tensor or field."""


class OutOfMemory(SixfoldError):
    """A model or cache does not fit: says how many bytes are needed and how many there are."""


class EngineDied(SixfoldError):
    """The engine process is gone."""


class CacheCorrupted(SixfoldError):
    """The accounting of cache pages contradicts itself: a bug, and the engine must stop."""


class RequestError(SixfoldError):
    """A request that cannot be served. Maps to an OpenAI error object.

    `param` names the offending field, `code` is a stable machine-readable word.
    """

    status = 400
    type = "invalid_request_error"

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class ContextLengthExceeded(RequestError):
    def __init__(
        self, limit: int, prompt: int, output: int | None, param: str = "messages"
    ) -> None:
        asked = f"{prompt} in the prompt" + (f", {output} for the completion" if output else "")
        super().__init__(
            f"This model's maximum context length is {limit} tokens. However, you requested "
            f"{prompt + (output or 0)} tokens ({asked}). Shorten the prompt or the completion.",
            param,
            "context_length_exceeded",
        )


class QueueFull(RequestError):
    """The bounded queue has no place; `retry_after` in seconds."""

    status = 429
    type = "rate_limit_error"

    def __init__(self, limit: int, retry_after: int = 1) -> None:
        super().__init__(
            f"The request queue is full ({limit} waiting). Retry in {retry_after} s.",
            None,
            "queue_full",
        )
        self.retry_after = retry_after
