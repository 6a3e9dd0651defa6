"""The head and the draw of captured decode steps. What rows ask for is planned on the host and goes
into reserved buffers; recorded are the products and the draw over them, once with filters and once
without, for a sort of the vocabulary is too much for rows that have none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...common.ops.draw import halves
from ..interface_step import StepBatch, Want

Draw = Callable[..., Tensor]
"""(hidden (R, width), temperature, top_k, top_p, min_p, draws, filtered) -> token ids (R,)."""


@dataclass(frozen=True, slots=True)
class DrawPlan:
    """Of R rows; floats (3, R): temperature, top_p, min_p. ints (3 R,): top_k, then the halves of
    each row's draw."""

    floats: NDArray[np.float32]
    ints: NDArray[np.int32]
    filtered: bool

    @property
    def rows(self) -> int:
        return self.floats.shape[1]


def plan_draw(batch: StepBatch, room: int) -> DrawPlan | None:
    """For `room` rows, greedy ones behind the step's. None where a row wants what is not recorded:
    several tokens or none, adjusted or masked logits, log-probabilities."""
    s = batch.sampling
    penalised = (s.repetition_penalty != 1) | (s.presence_penalty != 0) | (s.frequency_penalty != 0)
    adjusted = len(s.bias_ids) > 0 or bool(penalised.any()) or batch.grammar_mask is not None
    one_each = batch.draft_counts is None and bool((batch.want & Want.SAMPLE).all())
    if adjusted or not one_each or bool((s.logprobs >= 0).any()):
        return None
    more = (0, room - batch.rows)
    floats = [np.pad(x, more) for x in (s.temperature, s.top_p, s.min_p)]
    draws = np.pad(halves(s.uniform).view(np.int32), (more, (0, 0)))
    filtered = (s.temperature > 0) & ((s.top_k > 0) | (s.top_p < 1) | (s.min_p > 0))
    ints = np.concatenate((np.pad(s.top_k, more), draws.reshape(-1)))
    return DrawPlan(np.stack(floats), ints.astype(np.int32), bool(filtered.any()))


class CapturedDraw:
    """The reserved buffers of one bucket and the work over them: first op by op, then replayed."""

    def __init__(self, draw: Draw, hidden: Tensor) -> None:
        """`hidden` (rows, width): as the bucket's step gives it."""
        rows, device = len(hidden), hidden.device
        self.hidden = torch.zeros_like(hidden)
        self.floats = torch.zeros((3, rows), dtype=torch.float32, device=device)
        self.ints = torch.zeros((3 * rows,), dtype=torch.int32, device=device)
        temperature, top_p, min_p = self.floats.unbind(0)
        top_k, draws = self.ints[:rows], self.ints[rows:].view(rows, 2)
        asked = (temperature, top_k, top_p, min_p, draws)
        self.works: dict[bool, Callable[[], Tensor]] = {
            filtered: partial(draw, self.hidden, *asked, filtered) for filtered in (False, True)
        }

    def record(self, record: Callable[[Callable[[], Tensor]], Callable[[], Tensor]]) -> None:
        """Raises RuntimeError when a replay gives something else than the work itself."""
        for filtered, work in list(self.works.items()):
            replay = record(work)
            if not torch.equal(work(), replay()):
                raise RuntimeError(
                    f"The captured draw of {len(self.hidden)} rows differs from the draw itself; "
                    "--graphs off serves without capture."
                )
            self.works[filtered] = replay

    def run(self, plan: DrawPlan, hidden: Tensor) -> Tensor:
        """hidden (R, width) of the step's rows -> token ids (R,), valid until the next call."""
        self.floats.copy_(torch.from_numpy(plan.floats))
        self.ints.copy_(torch.from_numpy(plan.ints))
        self.hidden[: len(hidden)].copy_(hidden)
        return self.works[plan.filtered]()[: len(hidden)]
