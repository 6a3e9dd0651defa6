"""From the rows chosen for a step to the StepBatch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...platforms.interface_kv import I32
from ...platforms.interface_step import LAST_TOKEN, StepBatch, Want
from ..cache.kv_cache import KVCache
from ..cache.sequence import Sequence
from ..errors import CacheCorrupted
from .images import ImageSender
from .row import Row
from .sampling import SamplingBuilder


@dataclass(frozen=True, slots=True)
class Part:
    """One row's share of a step: its positions `start` to `start + count - 1`."""

    row: Row
    start: int
    count: int
    samples: bool
    drafts: tuple[int, ...] = ()  # the last of its tokens where they are guesses

    @property
    def end(self) -> int:
        """Where what is known ends, and drafts begin."""
        return self.start + self.count - len(self.drafts)

    @property
    def scores(self) -> bool:
        """Whether it brings log-probabilities of the prompt: some position's target is in it."""
        return self.row.scores_prompt and self.start < self.row.prompt_length - 1


class BatchBuilder:
    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._sampling = SamplingBuilder()
        self._images = ImageSender()

    def build(
        self, step: int, parts: list[Part], running: list[Row], wanted: I32 | None = None
    ) -> StepBatch:
        """No array is written to again, so the step may be read while the next is built. `wanted`:
        how many drafts each row is to get of the model's head, where that drafts."""
        rows = [part.row for part in parts]
        sequences = [held(row) for row in rows]
        starts = np.array([part.start for part in parts], np.int32)
        counts = np.array([part.count for part in parts], np.int32)
        query_start = np.zeros(len(parts) + 1, np.int32)
        np.cumsum(counts, out=query_start[1:])
        handles = np.array([sequence.handle for sequence in sequences], np.int32)
        pages = max(sequence.pages for sequence in sequences)
        cache = self._cache
        names = [group.name for group in cache.groups]
        sent = self._images.send(parts, running)
        drafts = [part.drafts for part in parts] if any(part.drafts for part in parts) else None
        ends = np.array([part.end for part in parts], np.int64)
        return StepBatch(
            step=step,
            row_ids=handles,
            token_ids=_tokens(parts, int(query_start[-1])),
            query_start=query_start,
            context_lens=starts,
            page_tables={names[g]: cache.tables[g][handles, :pages] for g in cache.paged},
            want=np.array([_want(part) for part in parts], np.uint8),
            sampling=self._sampling.build(rows, ends, drafts),
            state_slots={names[g]: cache.tables[g][handles, 0] for g in cache.recurrent},
            moves=cache.states.take_moves(),
            prompt_targets=_targets(parts, query_start),
            images=sent.images,
            images_done=sent.done,
            rotary=sent.rotary,
            draft_counts=None if drafts is None else np.array([*map(len, drafts)], np.int32),
            drafts_wanted=wanted,
            next_tokens=None if wanted is None else _next_tokens(parts),
        )


def held(row: Row) -> Sequence:
    """What a running row holds of the cache."""
    if row.sequence is None:
        raise CacheCorrupted(f"Request {row.request_id} runs without a sequence. This is a bug.")
    return row.sequence


def _want(part: Part) -> int:
    want = int(Want.SAMPLE) if part.samples else 0
    return want | int(Want.PROMPT_LOGPROBS) if part.scores else want


def _tokens(parts: list[Part], total: int) -> I32:
    if total == len(parts):
        return np.array(
            [LAST_TOKEN if p.start == p.row.known else p.row.tokens[p.start] for p in parts],
            np.int32,
        )
    pieces = [
        np.array([LAST_TOKEN], np.int32)
        if part.start == part.row.known
        else np.concatenate((part.row.tokens[part.start : part.end], part.drafts), dtype=np.int32)
        if part.drafts
        else part.row.tokens[part.start : part.end]
        for part in parts
    ]
    return np.concatenate(pieces)


def _next_tokens(parts: list[Part]) -> I32:
    return np.array([-1 if p.samples else p.row.tokens[p.end] for p in parts], np.int32)


def _targets(parts: list[Part], query_start: I32) -> I32 | None:
    if not any(part.scores for part in parts):
        return None
    targets = np.full(int(query_start[-1]), -1, np.int32)
    for part, begin in zip(parts, query_start.tolist(), strict=False):
        if part.scores:
            row = part.row
            end = min(part.start + part.count, row.prompt_length - 1)
            targets[begin : begin + end - part.start] = row.tokens[part.start + 1 : end + 1]
    return targets
