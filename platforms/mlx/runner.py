"""One step on MLX: StepBatch -> lazy arrays -> one evaluation -> StepResult.

`start` builds a piece of the step as a lazy graph while the device may still run the piece before;
then it lets that one end and starts its own. Ending it first is what allows MLX to write the pools
in place.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ..interface_kernels import KernelTable
from ..interface_kv import KVKind
from ..interface_step import LAST_TOKEN, PromptLogprobs, StepBatch, StepResult, Want
from ..sampling_rows import select_rows
from .caches import Cache, CacheGroup, bind
from .compiled_steps import CompiledSteps
from .pools import LayerStates
from .product_threads import ProductThreads
from .step_plan import Rows, pieces, plan_pages, plan_states
from .trunk import SplitModel

LOGITS_AT_ONCE = 1 << 24
"""Prompt log-probabilities are computed in slices of at most this many logits (64 MiB)."""


@dataclass(slots=True)
class Started:
    """What a step will give, as arrays that the device may still be computing."""

    batch: StepBatch
    began: float
    rows: NDArray[np.intp]  # that sample
    tokens: mx.array | None = None
    asking: NDArray[np.intp] | None = None  # of `rows`, those that want log-probabilities
    logprobs: tuple[mx.array, ...] = ()
    prompts: list[tuple[int, tuple[mx.array, ...]]] = field(default_factory=list)

    @property
    def arrays(self) -> list[mx.array]:
        result = [] if self.tokens is None else [self.tokens]
        return [*result, *self.logprobs, *(a for _, found in self.prompts for a in found)]


class MLXRunner:
    """Runs steps in order, on the thread that made it."""

    def __init__(
        self,
        model: SplitModel,
        groups: Sequence[CacheGroup],
        caches: Sequence[Cache],
        ops: KernelTable,
        max_rows: int,
        vocab_size: int,
        compiled: CompiledSteps | None = None,
        threads: ProductThreads | None = None,
    ) -> None:
        self._model = model
        self._compiled = compiled
        self._threads = threads
        self._groups = tuple(groups)
        self._caches = list(caches)  # in the model's order of layers
        self._ops = ops
        self._vocab_size = vocab_size
        self._last = mx.zeros((max_rows,), mx.int32)

    def start(self, batch: StepBatch) -> Started:
        began = time.perf_counter()
        parts = pieces(batch)
        self._settle(batch, parts)
        self._move(batch)
        hidden = []
        for rows in parts:
            hidden.append((rows, self._hidden(rows)))
            if rows is not parts[-1]:
                self._begin(rows, [hidden[-1][1]])
        started = Started(batch, began, np.flatnonzero(batch.want & Want.SAMPLE))
        if len(started.rows):
            self._sample(started, hidden)
        for rows, states in hidden:
            self._score_prompts(started, rows, states)
        self._begin(parts[-1], [*started.arrays, self._last])
        return started

    def _begin(self, rows: Rows, made: Sequence[mx.array]) -> None:
        """Starts what was built. The piece before has ended then, of this step or the last, and
        holds no buffer of a pool."""
        mx.synchronize()
        if self._threads is not None:
            self._threads.tell(len(rows.tokens))
        mx.async_eval(*made, *self._stored())

    def finish(self, started: Started) -> StepResult:
        """Waits for the step. `device_seconds` runs from its start to here."""
        batch, rows = started.batch, started.rows
        tokens = np.full((batch.rows, 1), -1, np.int32)
        accepted = np.zeros(batch.rows, np.int32)
        if started.tokens is not None:
            tokens[rows, 0] = np.array(started.tokens)
            accepted[rows] = tokens[rows, 0] >= 0
        else:
            mx.synchronize()
        return StepResult(
            step=batch.step,
            token_ids=tokens,
            accepted=accepted,
            prompt_logprobs=_prompt_results(started),
            device_seconds=time.perf_counter() - started.began,
            **_row_results(started),
        )

    def _stored(self) -> list[mx.array]:
        return [array for group in self._groups for pool in group.pools for array in pool.stored]

    def _settle(self, batch: StepBatch, parts: Sequence[Rows]) -> None:
        """Before anything is read: see `LayerStates`."""
        for group in self._groups:
            for pool in group.pools:
                if isinstance(pool, LayerStates):
                    slots = batch.state_slots[group.group.name].tolist()
                    pool.settle({tuple(slots[rows.first : rows.last]) for rows in parts})

    def _move(self, batch: StepBatch) -> None:
        for move in batch.moves:
            for group in self._groups:
                if group.group.name == move.group:
                    for pool in group.pools:
                        pool.copy([move.source], [move.target])

    def _hidden(self, rows: Rows) -> mx.array:
        """(R, S, width), or with more rows behind."""
        tokens = self._tokens(rows)
        if self._compiled is not None and self._compiled.serves(rows):
            return self._compiled.run(rows, tokens)
        self._bind(rows)
        return self._model.trunk(tokens, self._caches)

    def _bind(self, rows: Rows) -> None:
        for group in self._groups:
            recurrent = group.group.kind is KVKind.RECURRENT
            bind(group, (plan_states if recurrent else plan_pages)(rows, group.group))

    def _tokens(self, rows: Rows) -> mx.array:
        """(R, S), rows padded with token 0."""
        counts = rows.counts
        padded = np.zeros((len(counts), rows.width), np.int32)
        padded[np.arange(rows.width) < counts[:, None]] = rows.tokens
        tokens = mx.array(padded)
        waiting = padded == LAST_TOKEN
        if waiting.any():
            handles = rows.batch.row_ids[rows.first : rows.last].astype(np.uint32)
            tokens = mx.where(mx.array(waiting), self._last[mx.array(handles)][:, None], tokens)
        return tokens

    def _sample(self, started: Started, hidden: list[tuple[Rows, mx.array]]) -> None:
        batch, chosen = started.batch, started.rows
        ends = []
        for rows, states in hidden:
            inside = chosen[(chosen >= rows.first) & (chosen < rows.last)] - rows.first
            ends.append(_at(states, inside, rows.counts[inside] - 1))
        logits = self._logits(mx.concatenate(ends) if len(ends) > 1 else ends[0])
        sampling = select_rows(batch.sampling, chosen)
        handles = mx.array(batch.row_ids[chosen].astype(np.uint32))
        mask = batch.grammar_mask
        words = None if mask is None else mx.array(mask[chosen])
        waits = batch.token_ids[batch.query_start[chosen + 1] - 1] == LAST_TOKEN
        pending = mx.where(mx.array(waits), self._last[handles], -1) if waits.any() else None
        tokens = self._ops.sample(logits, sampling, words, pending)
        # A row without an answer (-1) is failed by the engine; a step already submitted for it
        # still needs a token that exists.
        sampled = mx.maximum(tokens, 0)
        self._last[handles] = sampled
        started.tokens = tokens
        asking = np.flatnonzero(sampling.logprobs >= 0)
        if len(asking):
            started.asking = asking
            where = mx.array(asking.astype(np.uint32))
            top = min(int(sampling.logprobs.max()), self._vocab_size)
            started.logprobs = self._ops.logprobs(logits[where], sampled[where], top)

    def _logits(self, hidden: mx.array) -> mx.array:
        """hidden (N, width) -> (N, V) float32."""
        return self._model.head(hidden[:, None])[:, 0, : self._vocab_size].astype(mx.float32)

    def _score_prompts(self, started: Started, rows: Rows, hidden: mx.array) -> None:
        batch = started.batch
        if batch.prompt_targets is None:
            return
        size = max(1, LOGITS_AT_ONCE // self._vocab_size)
        wanting = np.flatnonzero(batch.want[rows.first : rows.last] & Want.PROMPT_LOGPROBS)
        for place in wanting.tolist():
            row = rows.first + place
            span = batch.prompt_targets[batch.query_start[row] : batch.query_start[row + 1]]
            places = np.flatnonzero(span >= 0)
            top = min(max(0, int(batch.sampling.logprobs[row])), self._vocab_size)
            for at in range(0, len(places), size):
                some = places[at : at + size]
                logits = self._logits(_at(hidden, np.full(len(some), place), some))
                found = self._ops.logprobs(logits, mx.array(span[some].astype(np.int32)), top)
                started.prompts.append((row, found))


def _at(hidden: mx.array, rows: NDArray[np.integer], places: NDArray[np.integer]) -> mx.array:
    """hidden (R, S, width) at pairs of row and place -> (N, width)."""
    return hidden[mx.array(rows.astype(np.uint32)), mx.array(places.astype(np.uint32))]


def _row_results(started: Started) -> dict[str, Any]:
    """Arrays of StepResult; rows that were not asked hold NaN and -1."""
    if started.asking is None:
        return {}
    chosen, ids, best = (np.array(part) for part in started.logprobs)
    total, top = started.batch.rows, ids.shape[1]
    result: dict[str, Any] = {
        "logprobs": np.full(total, np.nan, np.float32),
        "top_ids": np.full((total, top), -1, np.int32),
        "top_logprobs": np.full((total, top), np.nan, np.float32),
    }
    where = started.rows[started.asking]
    for array, values in zip(result.values(), (chosen, ids, best), strict=True):
        array[where] = values
    return result


def _prompt_results(started: Started) -> tuple[PromptLogprobs, ...]:
    rows: dict[int, list[tuple[NDArray[np.generic], ...]]] = {}
    for row, found in started.prompts:
        rows.setdefault(row, []).append(tuple(np.array(part) for part in found))
    result = []
    for row, parts in rows.items():
        chosen, ids, best = (np.concatenate(found) for found in zip(*parts, strict=True))
        result.append(PromptLogprobs(row, chosen, ids.astype(np.int32), best))
    return tuple(result)
