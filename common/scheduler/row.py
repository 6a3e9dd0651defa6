"""One request as the scheduler knows it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...platforms.interface_kv import I32
from ..cache.sequence import Sequence
from ..messages import AddRequest, TokenLogprobs
from .images import RowImages

F32 = NDArray[np.float32]


class Row:
    """A request's tokens and how far they are computed.

    `tokens[:known]` are the prompt and the tokens collected so far; the first `computed` positions
    have been scheduled; `in_flight` tokens are sampled but not collected. A row is *decoding* from
    the step that computes its last known token on; preemption makes it start over. `keys` is what
    the tree knows the tokens by: the same array, unless the prompt has images.
    """

    __slots__ = (
        "arrival",
        "bans",
        "bias",
        "cached",
        "computed",
        "decoding",
        "done",
        "images",
        "in_flight",
        "keys",
        "known",
        "limit",
        "order",
        "params",
        "penalised",
        "plain",
        "priority",
        "prompt_length",
        "prompt_logprobs",
        "proposed",
        "reached",
        "request_id",
        "sequence",
        "started",
        "stops",
        "tokens",
    )

    def __init__(
        self,
        request: AddRequest,
        prompt: I32,
        limit: int,
        arrival: int,
        eos: frozenset[int],
        images: RowImages | None = None,
    ) -> None:
        params = request.params
        self.request_id = request.request_id
        self.params = params
        self.priority = request.priority
        self.order = (-request.priority, arrival)  # smaller runs first, is preempted last
        self.tokens = prompt
        self.images = images
        self.keys = prompt if images is None else images.keys(prompt)
        self.prompt_length = self.known = len(prompt)
        self.limit = limit  # prompt and output tokens at which it ends with "length"
        self.computed = 0
        self.in_flight = 0
        self.reached = 0  # positions computed once; after a preemption they are computed again
        self.cached = 0  # prompt tokens served from the prefix tree
        self.decoding = False
        self.done = False
        self.started = False  # its first message has been delivered
        self.sequence: Sequence | None = None
        self.proposed: tuple[int, ...] = ()  # what the model's head guesses to come next
        self.prompt_logprobs: list[TokenLogprobs | None] = [None]
        self.stops = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos)
        self.bias = _pairs(params.logit_bias)
        self.bans = _pairs({**params.logit_bias, **dict.fromkeys(self.stops, -np.inf)})
        self.penalised = (
            params.repetition_penalty != 1
            or params.presence_penalty != 0
            or params.frequency_penalty != 0
        )
        # A plain row's sampling arrays never change but for the draw.
        self.plain = not (
            self.penalised or params.min_tokens > 0 or params.prompt_logprobs is not None
        )

    @property
    def outputs(self) -> int:
        return self.known - self.prompt_length

    @property
    def exhausted(self) -> bool:
        """All tokens it may have are sampled; the last is in flight."""
        return self.known + self.in_flight >= self.limit

    def must_go_on(self, drafts: int = 0) -> bool:
        """The token sampled next, or behind so many drafts, must not end the request."""
        return self.outputs + self.in_flight + drafts < self.params.min_tokens

    @property
    def scores_prompt(self) -> bool:
        """It still owes the log-probabilities of its prompt, so every prompt token is computed."""
        return self.params.prompt_logprobs is not None and not self.started

    def append(self, token: int) -> None:
        if self.known == len(self.tokens):
            room = min(max(2 * self.known, 64), max(self.limit, self.known + 1))
            keyed = self.keys is not self.tokens
            self.tokens = _grown(self.tokens, room)
            self.keys = _grown(self.keys, room) if keyed else self.tokens
        self.tokens[self.known] = self.keys[self.known] = token
        self.known += 1

    def restart(self) -> None:
        """Forget what was computed: everything known is a prompt now."""
        self.computed = 0
        self.decoding = False
        self.sequence = None
        self.proposed = ()
        if not self.started:
            self.prompt_logprobs = [None]


def _grown(array: I32, room: int) -> I32:
    grown = np.empty(room, np.int32)
    grown[: len(array)] = array
    return grown


def _pairs(bias: dict[int, float]) -> tuple[I32, F32]:
    ids = np.fromiter(bias.keys(), np.int32, len(bias))
    return ids, np.fromiter(bias.values(), np.float32, len(bias))
