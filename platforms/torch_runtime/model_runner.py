"""One step on the device: StepBatch -> tensors -> model -> wanted logits -> StepResult."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...common.errors import ConfigError
from ...models.base import Model
from ..interface import Decision, LoadProgress
from ..interface_kernels import KernelTable
from ..interface_step import LAST_TOKEN, PromptLogprobs, StepBatch, StepResult, Want
from ..sampling_rows import select_rows
from .device import TorchDevice
from .draft_head import DraftHead
from .graph_runner import GraphRunner
from .image_rows import ImageEncoder
from .sample_lines import SampleLines
from .step_caches import Pool
from .step_program import NotCaptured, StepProgram, StepRunner

I64 = NDArray[np.int64]

LOGITS_AT_ONCE = 1 << 24
"""Prompt log-probabilities are computed in slices of at most this many logits (64 MiB)."""


class ModelRunner:
    """Runs steps in order; remembers on the device what each row sampled last."""

    def __init__(
        self,
        model: Model,
        program: StepProgram,
        pools: Mapping[str, Pool],
        ops: KernelTable,
        device: TorchDevice,
        max_rows: int,
        vocab_size: int,
    ) -> None:
        self._model = model
        self._program = program
        self._pools = pools
        self._ops = ops
        self._device = device
        self._vocab_size = vocab_size
        self._max_rows = max_rows
        self._last = torch.zeros(max_rows, dtype=torch.int64, device=device.torch_device)
        self._step: StepRunner = program.run
        self._draw: Callable[[StepBatch, Tensor], Tensor | None] = lambda batch, hidden: None
        self._images = ImageEncoder(model, device)
        self._head = DraftHead(model, program, device)

    @torch.inference_mode()
    def capture(
        self, wanted: str | None, max_tokens: int, progress: LoadProgress | None = None
    ) -> Decision:
        """Let the device capture the step. `wanted`: "on", "off", or None where the user left it to
        the device. Raises ConfigError when "on" cannot be had."""
        if wanted == "off":
            return Decision("step", "op by op", "set by the user")
        try:
            graphs = self._device.graphs
            if graphs is None:
                raise NotCaptured("this device captures nothing")
            captured = graphs.capture(self._program, self._max_rows, max_tokens, progress)
            self._step, decision = captured
            if isinstance(self._step, GraphRunner):
                self._draw = self._step.draw
        except NotCaptured as error:
            if wanted == "on":
                raise ConfigError(f"--graphs on cannot be had: {error}. Use off.") from None
            return Decision("step", "op by op", str(error), (("captured", str(error)),))
        return decision

    @torch.inference_mode()
    def run(self, batch: StepBatch) -> StepResult:
        """Waits for the device; `device_seconds` is the time from here to the last result."""
        began = time.perf_counter()
        self._move(batch)
        token_ids = self._token_ids(batch)
        positions = self._device.to_device(rotary_positions(batch))
        images = self._images.placed(batch)
        if images is None:
            hidden = self._step(batch, token_ids, positions)
        else:
            # Captured steps read embeddings of tokens alone.
            hidden = self._program.run(batch, token_ids, positions, images)
        result = self._sample(batch, hidden)
        answers = result["token_ids"], result["accepted"]
        drafts = self._head.run(batch, hidden, positions, *answers)
        prompts = self._prompt_logprobs(batch, hidden)
        return StepResult(
            step=batch.step,
            prompt_logprobs=prompts,
            device_seconds=time.perf_counter() - began,
            drafts=drafts,
            **result,
        )

    def _move(self, batch: StepBatch) -> None:
        """One by one: a move may copy from the target of an earlier one, `copy` reads first."""
        for move in batch.moves:
            self._pools[move.group].copy([move.source], [move.target])

    def _token_ids(self, batch: StepBatch) -> Tensor:
        waiting = (batch.token_ids == LAST_TOKEN).nonzero()[0]
        if len(waiting) == len(batch.token_ids) == batch.rows:  # every row decodes
            return self._last[self._device.to_device(batch.row_ids.astype(np.int64))]
        tokens = self._device.to_device(batch.token_ids.astype(np.int64))
        if len(waiting):
            rows = np.searchsorted(batch.query_start, waiting, side="right") - 1
            handles = self._device.to_device(batch.row_ids[rows].astype(np.int64))
            where = self._device.to_device(waiting.astype(np.int64))
            tokens = tokens.index_copy(0, where, self._last[handles])
        return tokens

    def _sample(self, batch: StepBatch, hidden: Tensor) -> dict[str, Any]:
        made = SampleLines.of(batch)
        if not len(made.rows):
            tokens, accepted, _ = made.results(batch, np.empty(0, np.int32))
            return {"token_ids": tokens, "accepted": accepted}
        handles = self._device.to_device(batch.row_ids[made.owners].astype(np.int64))
        logprobs: dict[str, Any] = {}
        chosen = self._draw(batch, hidden)
        if chosen is None:
            chosen, logprobs = self._choose(batch, hidden, made, handles)
        # A row without an answer (-1) is failed by the engine; a step already submitted for it
        # still needs a token that exists.
        sampled = chosen.clamp(min=0)
        if batch.draft_counts is None:
            self._last.index_copy_(0, handles, sampled)
        tokens, accepted, last = made.results(batch, self._device.to_host(chosen))
        if batch.draft_counts is not None:
            where = self._device.to_device(last)
            self._last.index_copy_(0, handles[where], sampled[where])
        return {"token_ids": tokens, "accepted": accepted, **logprobs}

    def _choose(
        self, batch: StepBatch, hidden: Tensor, made: SampleLines, handles: Tensor
    ) -> tuple[Tensor, dict[str, Any]]:
        """Op by op: the tokens of all lines, and the log-probabilities that StepResult has."""
        logits = self._model.logits(self._rows_of(hidden, made.places))
        sampling = select_rows(batch.sampling, made.lines)
        mask = batch.grammar_mask
        words = None if mask is None else self._device.to_device(mask[made.lines].view(np.int32))
        pending = None
        if (batch.token_ids[made.places] == LAST_TOKEN).any():
            waits = self._device.to_device(batch.token_ids[made.places] == LAST_TOKEN)
            pending = torch.where(waits, self._last[handles], -1)
        chosen = self._ops.sample(logits, sampling, words, pending)
        asking = np.flatnonzero(sampling.logprobs >= 0)
        if not len(asking):
            return chosen, {}
        counts, total = sampling.logprobs, int(batch.line_start[-1])
        sampled = chosen.clamp(min=0)
        return chosen, self._row_logprobs(logits, sampled, made.lines, asking, counts, total)

    def _rows_of(self, hidden: Tensor, rows: I64) -> Tensor:
        if len(rows) == len(hidden):
            return hidden
        return hidden.index_select(0, self._device.to_device(rows))

    def _row_logprobs(
        self,
        logits: Tensor,
        tokens: Tensor,
        lines: I64,
        asking: I64,
        counts: NDArray[np.int32],
        total: int,
    ) -> dict[str, Any]:
        """Arrays of StepResult for its `total` lines. `lines` sampled, of these `asking` want
        log-probabilities; lines of the step that do not hold NaN and -1."""
        top = min(int(counts.max()), logits.shape[1])
        if len(asking) < len(lines):
            where = self._device.to_device(asking.astype(np.int64))
            logits, tokens = logits.index_select(0, where), tokens.index_select(0, where)
        found = self._ops.logprobs(logits, tokens, top)
        chosen, ids, best = (self._device.to_host(part) for part in found)
        result: dict[str, Any] = {
            "logprobs": np.full(total, np.nan, np.float32),
            "top_ids": np.full((total, top), -1, np.int32),
            "top_logprobs": np.full((total, top), np.nan, np.float32),
        }
        for array, values in zip(result.values(), (chosen, ids, best), strict=True):
            array[lines[asking]] = values
        return result

    def _prompt_logprobs(self, batch: StepBatch, hidden: Tensor) -> tuple[PromptLogprobs, ...]:
        targets = batch.prompt_targets
        if targets is None:
            return ()
        rows = np.flatnonzero(batch.want & Want.PROMPT_LOGPROBS)
        if not len(rows):
            return ()
        spans = [np.arange(batch.query_start[r], batch.query_start[r + 1]) for r in rows]
        wanted = [span[targets[span] >= 0] for span in spans]
        lines = batch.line_start[rows]
        counts = [max(0, int(batch.sampling.logprobs[line])) for line in lines]
        places = np.concatenate(wanted).astype(np.int64)
        top = min(max(counts), self._vocab_size)
        size = max(1, LOGITS_AT_ONCE // self._vocab_size)
        slices = [
            self._logprobs_at(hidden, places[at : at + size], targets, top)
            for at in range(0, len(places), size)
        ]
        if not slices:
            return ()
        chosen, ids, best = (np.concatenate(parts) for parts in zip(*slices, strict=True))
        result, at = [], 0
        for row, span, count in zip(rows, wanted, counts, strict=True):
            part = slice(at, at + len(span))
            at += len(span)
            if len(span):
                result.append(
                    PromptLogprobs(int(row), chosen[part], ids[part, :count], best[part, :count])
                )
        return tuple(result)

    def _logprobs_at(
        self, hidden: Tensor, places: I64, targets: NDArray[np.int32], top: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.float32]]:
        logits = self._model.logits(hidden.index_select(0, self._device.to_device(places)))
        tokens = self._device.to_device(targets[places].astype(np.int64))
        chosen, ids, best = (
            self._device.to_host(part) for part in self._ops.logprobs(logits, tokens, top)
        )
        return chosen, ids.astype(np.int32), best


def rotary_positions(batch: StepBatch) -> I64:
    """(T,) int64; (3, T) where the axes differ, which is in steps with images' rows alone."""
    if batch.rotary is None:
        start = batch.query_start
        shift = (batch.context_lens - start[:-1]).repeat(start[1:] - start[:-1])
        return (np.arange(len(shift)) + shift).astype(np.int64, copy=False)
    rotary = batch.rotary.astype(np.int64)
    return rotary[0] if (rotary == rotary[0]).all() else rotary
