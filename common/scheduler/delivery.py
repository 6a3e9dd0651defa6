"""From a StepResult to the messages that clients get."""

from __future__ import annotations

from collections.abc import Sequence

from ...platforms.interface_step import PromptLogprobs, StepBatch, StepResult
from ..errors import EngineDied
from ..messages import ErrorBody, Output, TokenLogprobs
from .batch import Part
from .row import Row

NO_TOKEN = -1


class StepReader:
    """One result as plain Python values. Raises EngineDied when it does not fit its step."""

    def __init__(self, batch: StepBatch, result: StepResult, vocab_size: int) -> None:
        if result.step != batch.step or len(result.token_ids) != batch.rows:
            raise EngineDied(
                f"The executor answered step {batch.step} ({batch.rows} rows) with step "
                f"{result.step} ({len(result.token_ids)} rows)."
            )
        self._tokens: list[list[int]] = result.token_ids.tolist()
        self._accepted: list[int] = result.accepted.tolist()
        self._line_start: list[int] = batch.line_start.tolist()
        self._vocab_size = vocab_size
        self._result = result

    def tokens(self, index: int, drafts: tuple[int, ...]) -> list[int | None]:
        """What the row sampled, as far as its drafts were right; None in a place where the executor
        found no token that it may sample. At least one entry."""
        count = self._accepted[index]
        found = [self._token(token) for token in self._tokens[index][:count]]
        if found[: len(drafts)] == list(drafts[:count]) and count <= len(drafts):
            return [*found, None]
        if len(found) != count or found[:-1] != list(drafts[: count - 1]):
            raise EngineDied(
                f"The executor accepted {count} tokens of row {index} in step {self._result.step}; "
                f"they are {found} and its drafts {list(drafts)}."
            )
        return list(found)

    def _token(self, token: int) -> int:
        if not 0 <= token < self._vocab_size:
            raise EngineDied(
                f"The executor sampled token {token} in step {self._result.step}; ids are in "
                f"0..{self._vocab_size - 1}."
            )
        return token

    def logprobs(self, index: int, place: int, token: int, count: int) -> TokenLogprobs:
        """Of the token that row `index` sampled at `place` of its samples, and the `count` best."""
        result, line = self._result, self._line_start[index] + place
        if result.logprobs is None:
            raise EngineDied(f"The executor left out the log-probabilities of step {result.step}.")
        value = float(result.logprobs[line])
        if not count or result.top_ids is None or result.top_logprobs is None:
            return TokenLogprobs(token, value)
        ids = result.top_ids[line, :count].tolist()
        return TokenLogprobs(token, value, ids, result.top_logprobs[line, :count].tolist())

    def proposed(self, index: int) -> tuple[int, ...]:
        """What the model's head drafts for the row's next step."""
        if self._result.drafts is None:
            return ()
        return tuple(self._token(t) for t in self._result.drafts[index].tolist() if t != NO_TOKEN)


def extend_prompt_logprobs(part: Part, scores: PromptLogprobs) -> None:
    """Append the scores of one chunk to those of its row."""
    row, count = part.row, part.row.params.prompt_logprobs or 0
    targets = row.tokens[part.start + 1 : part.start + 1 + len(scores.token_logprobs)].tolist()
    values = scores.token_logprobs.tolist()
    top_ids, top_values = (
        scores.top_ids[:, :count].tolist(),
        scores.top_logprobs[:, :count].tolist(),
    )
    row.prompt_logprobs += [
        TokenLogprobs(*entry) for entry in zip(targets, values, top_ids, top_values, strict=True)
    ]


def message(
    row: Row,
    tokens: Sequence[int],
    logprobs: list[TokenLogprobs] | None,
    finish_reason: str | None,
    stop_token: int | None,
) -> Output:
    """The next message of a row; the first one also carries what is known of its prompt."""
    first = not row.started
    scores = row.prompt_logprobs if first and row.scores_prompt else None
    if scores is not None and len(scores) != row.prompt_length:
        raise EngineDied(
            f"The executor left out prompt log-probabilities of request {row.request_id}."
        )
    cached = row.cached if first else None
    row.started = True
    return Output(
        request_id=row.request_id,
        token_ids=list(tokens),
        logprobs=logprobs,
        prompt_logprobs=scores,
        finish_reason=finish_reason,
        stop_token_id=stop_token,
        cached_tokens=cached,
    )


def no_token(row: Row, tokens: Sequence[int], logprobs: list[TokenLogprobs] | None) -> Output:
    """The end of a row for which the executor could sample nothing behind `tokens`."""
    body = ErrorBody(
        "No token could be sampled: every token is banned, or the model's output is not a number. "
        "Check logit_bias and min_tokens; without them, the checkpoint or its dtype.",
        code="no_token",
    )
    return Output(
        request_id=row.request_id,
        token_ids=list(tokens),
        logprobs=logprobs,
        finish_reason="error",
        error=body,
    )
