"""Drafts in a step, and taking back those that were wrong.

A row that decodes may have guesses behind its last known token. The executor samples in place of
each of them, from what is before it, and the scheduler keeps samples while the guess before was
right: so the output is the one without drafts. Pages simply forget their tail: what is behind a
row's known tokens is not in the tree, and is written anew before it is read. A recurrent state
cannot forget, so a copy from before the drafts is kept in a slot of its own; where some are wrong
it is restored, and the next step computes the right ones again.

Steps do not overlap while this is on: what to guess, and where a row stands, follow from the result
of the step before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ...platforms.interface import ExecutorInfo, Status
from ...platforms.interface_kv import I32
from ..cache.kv_cache import KVCache
from ..config import EngineConfig
from ..errors import ConfigError
from ..speculative.drafters import HeadDrafter, make_drafter
from ..telemetry.load import LoadCounters
from .batch import Part, held
from .row import Row


class Speculation:
    """`drafter` may be replaced; `most` are the drafts of a row in one step."""

    def __init__(
        self,
        name: str,
        config: EngineConfig,
        info: ExecutorInfo,
        cache: KVCache,
        counters: LoadCounters,
    ) -> None:
        """Raises ConfigError where the executor verifies no drafts."""
        support = info.features.get("drafts")
        if support is None or support.status is Status.NO:
            reason = support.reason if support else "it does not say that it verifies drafts."
            raise ConfigError(
                f"--draft {name} cannot be had on platform {info.device.kind!r}: {reason} "
                "Leave --draft out, or serve on another platform."
            )
        self.drafter = make_drafter(name)
        self.most = config.draft_tokens
        self._budget = info.max_step_tokens
        self._cache = cache
        self._counters = counters
        self._max_rows = min(info.max_rows, info.max_step_tokens)

    def extend(self, parts: list[Part], running: int) -> list[Part]:
        """Drafts for the rows that decode, from what budget and pages the step has left: nobody is
        preempted, and no prompt waits, for a guess. `running` rows are there in all."""
        left = self._budget - sum(part.count for part in parts)
        result = []
        for part in parts:
            drafts = self._drafts(part, min(self.most, left), running)
            left -= len(drafts)
            part.row.computed += len(drafts)
            part.row.proposed = ()
            result.append(replace(part, count=part.count + len(drafts), drafts=drafts))
        return result

    def _drafts(self, part: Part, most: int, running: int) -> tuple[int, ...]:
        row = part.row
        most = min(most, row.limit - row.known - 1)
        # What was wrong before is computed again here; as long as that is little, with new drafts.
        if most < 1 or not (part.samples and row.decoding) or part.count > 1 + self.most:
            return ()
        drafts = self.drafter.propose(row, most)
        drafts = drafts[: self._places(row, row.known + len(drafts), running) - row.known]
        return drafts if drafts and self._keep_state(part, running) else ()

    def _places(self, row: Row, end: int, running: int) -> int:
        """How many of a row's first `end` tokens have a place in the cache, after taking pages that
        leave one for each other row."""
        cache, sequence = self._cache, held(row)
        more = cache.pages_for(end) - sequence.pages
        if more > 0 and cache.room() - more >= running:
            cache.grow(sequence, more)
        return min(end, sequence.pages * cache.page_size)

    def _keep_state(self, part: Part, running: int) -> bool:
        """Whether the state before the part is, or will be, there to go back to."""
        spare = self._max_rows - running  # rows that may come need a slot each
        return self._cache.states.keep(held(part.row), part.start, spare)

    def wanted(self, parts: Sequence[Part], running: int) -> I32 | None:
        """How many drafts the model's head is to make for each row; None where it does not draft.
        Its own guesses have places in the cache too: the first is made without one."""
        if not isinstance(self.drafter, HeadDrafter):
            return None
        return np.array([self._wanted(part, running) for part in parts], np.int32)

    def _wanted(self, part: Part, running: int) -> int:
        if not part.samples:
            return 0
        row, end = part.row, part.start + part.count
        most = min(self.most, row.limit - row.known - 2)
        if most < 1:
            return 0
        return self._places(row, min(end + most - 1, row.limit), running) - end + 1

    def settle(self, part: Part, tokens: int) -> None:
        """`tokens` of the part's samples count, of which the last is no draft, or was behind them.
        Before they are appended to the row: it stands where they end, or where its state does."""
        row, right = part.row, tokens - 1
        self._counters.drafted_tokens += len(part.drafts)
        self._counters.accepted_drafts += right
        if right < len(part.drafts):
            row.computed = part.end + right

    def restore(self, part: Part, tokens: int) -> None:
        """Of a row that goes on: its state is taken back where a draft was wrong."""
        if self._cache.recurrent and tokens - 1 < len(part.drafts):
            part.row.computed = self._cache.states.take_back(held(part.row))
