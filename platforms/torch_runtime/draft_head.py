"""The model's draft head behind each step: it reads what the step computed and the tokens that it
sampled, keeps its own caches up to date, and guesses what comes next."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ...models.base import Model
from ..interface_step import StepBatch, Want
from .device import TorchDevice
from .sample_lines import spans
from .step_program import StepProgram

I32 = NDArray[np.int32]
I64 = NDArray[np.int64]


class DraftHead:
    """Entry t of the head is made of the model's hidden state at t and token t + 1; it predicts
    token t + 2. For guesses beyond that the head goes on from its own hidden states and guesses;
    what these leave in its caches lies behind the row's tokens and is written anew."""

    def __init__(self, model: Model, program: StepProgram, device: TorchDevice) -> None:
        self._model = model
        self._program = program
        self._device = device

    def run(
        self, batch: StepBatch, hidden: Tensor, positions: Tensor, tokens: I32, accepted: I32
    ) -> I32 | None:
        """hidden (T, …) and positions of the step; `tokens` and `accepted` as in StepResult
        -> (R, K) drafts, -1 where there is none; None where the step wants no head."""
        if batch.drafts_wanted is None or batch.next_tokens is None:
            return None
        counts = _entries(batch, accepted)
        inside = self._device.to_device(spans(batch.query_start[:-1], counts))
        step = replace(
            batch,
            token_ids=_following(batch, counts, tokens, accepted),
            query_start=np.concatenate(([0], np.cumsum(counts))).astype(np.int32),
        )
        positions = positions.index_select(-1, inside)
        made = self._forward(step, hidden.index_select(0, inside), positions)
        drafts = np.full((batch.rows, int(batch.drafts_wanted.max(initial=0))), -1, np.int32)
        rows, from_last = np.arange(batch.rows), step.query_start[1:].astype(np.int64) - 1
        for place in range(drafts.shape[1]):
            going = batch.drafts_wanted[rows] > place
            rows, where = rows[going], self._device.to_device(from_last[going])
            made, positions = made.index_select(0, where), positions.index_select(-1, where)
            if place:
                context = batch.context_lens[rows] + counts[rows] + place - 1
                positions = positions + 1
                made = self._forward(_chained(batch, rows, context, drafts), made, positions)
            best = self._model.draft_logits(made).argmax(dim=-1)
            drafts[rows, place] = self._device.to_host(best)
            from_last = np.arange(len(rows))
        return drafts

    def _forward(self, step: StepBatch, hidden: Tensor, positions: Tensor) -> Tensor:
        tokens = self._device.to_device(step.token_ids.astype(np.int64))
        bound = self._program.bind(self._program.plan(step))
        return self._program.draft(hidden, tokens, positions, bound)


def _entries(batch: StepBatch, accepted: I32) -> I64:
    """(R,) how many of each row's tokens are right, and get an entry."""
    counts = np.diff(batch.query_start).astype(np.int64)
    if batch.draft_counts is None:
        return counts
    right = np.maximum(accepted, 1) - 1
    return np.where(batch.want & Want.SAMPLE, counts - batch.draft_counts + right, counts)


def _following(batch: StepBatch, counts: I64, tokens: I32, accepted: I32) -> I32:
    """The token after each entry: the next of the step, behind the last what the row sampled last
    or the engine knows to come. Where nothing could be sampled the row ends, whatever it is."""
    starts = batch.query_start[:-1]
    inside = np.minimum(spans(starts, counts) + 1, len(batch.token_ids) - 1)
    found = batch.token_ids[inside]
    last = tokens[np.arange(batch.rows), np.maximum(accepted, 1) - 1]
    known = batch.next_tokens if batch.next_tokens is not None else last
    found[np.cumsum(counts) - 1] = np.maximum(np.where(known >= 0, known, last), 0)
    return found


def _chained(batch: StepBatch, rows: I64, context: NDArray[np.integer], drafts: I32) -> StepBatch:
    """A step of one token for each of `rows`: its last draft so far."""
    last = (drafts[rows] >= 0).sum(axis=1) - 1
    return replace(
        batch,
        row_ids=batch.row_ids[rows],
        token_ids=drafts[rows, last],
        query_start=np.arange(len(rows) + 1, dtype=np.int32),
        context_lens=context.astype(np.int32),
        page_tables={name: table[rows] for name, table in batch.page_tables.items()},
        state_slots={name: slots[rows] for name, slots in batch.state_slots.items()},
        draft_counts=None,
    )
