"""Drafters of a test's own: they know each request's answer and spoil a share of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from support.engine_traffic import EOS, Arrival, draw
from support.mock_model import alone

from sixfold.common.engine import Engine
from sixfold.platforms.interface import ExecutorInfo


class KnowingDrafter:
    """Guesses that are right with probability `right` each; a share of `fewer` are any number up to
    what is asked, the others all of it."""

    def __init__(
        self, answers: Mapping[str, Sequence[int]], right: float, vocab: int, fewer: float = 0.3
    ) -> None:
        self._answers = answers
        self._right = right
        self._vocab = vocab
        self._fewer = fewer
        self._rng = np.random.default_rng(0)

    def propose(self, row: Any, most: int) -> tuple[int, ...]:
        rng, made = self._rng, row.known - row.prompt_length
        count = int(rng.integers(0, most + 1)) if rng.random() < self._fewer else most
        answer = list(self._answers[row.request_id][made : made + count])
        answer += rng.integers(0, self._vocab, count - len(answer)).tolist()
        wrong = rng.random(count) >= self._right
        other = rng.integers(0, self._vocab, count)
        return tuple(np.where(wrong, other, np.array(answer, np.int64)).tolist())


def answers(arrivals: Sequence[Arrival], info: ExecutorInfo) -> dict[str, list[int]]:
    """By request, the token that ends it too."""
    found = {}
    for number, arrival in enumerate(arrivals):
        own = alone(arrival.prompt, arrival.params, info, EOS, draw, arrival.see)
        found[str(number)] = own.tokens + ([] if own.stop_token is None else [own.stop_token])
    return found


def draft_with(engine: Engine, drafter: Any) -> Engine:
    speculation = engine._scheduler.speculation
    if speculation is None:
        raise ValueError("the engine drafts nothing")
    speculation.drafter = drafter
    return engine
