"""One request's output: token ids in, finished text with its tokens out."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ..messages import Output, TokenLogprobs
from .logprobs import TokenEntry
from .stops import StopMatcher


class TextStream(Protocol):
    def step(self, token_id: int) -> str:
        """Text that became complete with this token; "" inside an unfinished character."""
        ...

    def flush(self) -> str:
        """What an unfinished character leaves (replacement characters)."""
        ...


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What became certain: text, the tokens that begin in it, and how the request ended."""

    text: str
    tokens: list[TokenEntry]
    finish_reason: str | None = None

    @property
    def empty(self) -> bool:
        return not self.text and not self.tokens and self.finish_reason is None


class OutputText:
    """Turns the engine's Outputs of one sequence into TextDeltas.

    A token is delivered together with the text it begins, so a token whose text may still become
    a stop string is held back with it, and is dropped with it. `finished` tells the caller that
    the text has ended, be it by a stop string that the engine knows nothing of.
    """

    def __init__(
        self,
        stream: TextStream,
        stops: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._stream = stream
        self._matcher = StopMatcher(stops, include_stop)
        self._min_tokens = min_tokens
        self._waiting: deque[TokenEntry] = deque()
        self._decoded = 0  # characters seen, also those held back
        self._released = 0  # characters delivered
        self.completion_tokens = 0  # sampled for this output, the one that ended it too
        self.finished = False

    def feed(self, output: Output) -> TextDelta:
        """Process one message of the engine. After `finished` there must be no further call."""
        parts: list[str] = []
        for index, token_id in enumerate(output.token_ids):
            given = output.logprobs[index] if output.logprobs is not None else None
            parts.append(self._token(token_id, given))
            if self._matcher.matched is not None:
                self.finished = True
                return self._delta("".join(parts), "stop")
        if output.finish_reason is None:
            return self._delta("".join(parts), None)
        if output.stop_token_id is not None:
            self.completion_tokens += 1
        tail = self._stream.flush()
        self._decoded += len(tail)
        parts += [self._matcher.push(tail), self._matcher.flush()]
        self.finished = True
        reason = "stop" if self._matcher.matched is not None else output.finish_reason
        return self._delta("".join(parts), reason)

    def _token(self, token_id: int, logprobs: TokenLogprobs | None) -> str:
        self.completion_tokens += 1
        self._waiting.append(TokenEntry(token_id, self._decoded, logprobs))
        text = self._stream.step(token_id)
        self._decoded += len(text)
        return self._matcher.push(text, armed=self.completion_tokens >= self._min_tokens)

    def _delta(self, text: str, reason: str | None) -> TextDelta:
        self._released += len(text)
        cut_short = self._matcher.matched is not None
        everything = reason is not None and not cut_short
        ready: list[TokenEntry] = []
        while self._waiting and (everything or self._waiting[0].offset < self._released):
            ready.append(self._waiting.popleft())
        return TextDelta(text, ready, reason)
