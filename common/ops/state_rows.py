"""The rows of a step as ops with a recurrent state see them, shared by their contracts.

Row r has the tokens query_start[r] .. query_start[r + 1] of the step and the state in slot
slots[r]. It begins from the zero state when context_lens[r] is 0, whatever the slot holds, NaN
included; otherwise from what the slot holds. After the op the slot holds the state behind the row's
last token. A row of slot -1 is padding: its results are zero and no slot is touched. Slots of one
step differ; slot 0 is like any other here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .contract import F32, I32


@dataclass(frozen=True, slots=True)
class StateRows:
    """Rows of a case: (context, new tokens) each; rows in `padding` have no slot."""

    name: str
    rows: tuple[tuple[int, int], ...]
    padding: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        return sum(new for _, new in self.rows)

    def arguments(self, rng: np.random.Generator) -> dict[str, Any]:
        slots = rng.permutation(len(self.rows) + 2)[: len(self.rows)].astype(np.int32)
        slots[list(self.padding)] = -1
        new = [new for _, new in self.rows]
        return {
            "slots": slots,
            "query_start": np.concatenate(([0], np.cumsum(new))).astype(np.int32),
            "context_lens": np.array([context for context, _ in self.rows], np.int32),
        }

    def state(self, rng: np.random.Generator, slots: I32, *shape: int, scale: float = 1.0) -> F32:
        """(S, *shape): what earlier steps left; NaN where nobody may read."""
        state = np.full((len(self.rows) + 2, *shape), np.nan, np.float32)
        for slot, (context, _) in zip(slots, self.rows, strict=True):
            if context and slot >= 0:
                state[slot] = rng.standard_normal(shape) * scale
        return state


ROWS = (
    StateRows("one_token", ((9, 1),)),
    StateRows("first_token", ((0, 1),)),
    StateRows("decode", ((5, 1), (1, 1), (0, 1), (700, 1))),
    StateRows("decode_with_padding", ((5, 1), (3, 1), (0, 1)), padding=(1, 2)),
    StateRows("prefill", ((0, 21),)),
    StateRows("two_tokens", ((0, 2), (4, 2), (1, 2))),
    StateRows("mixed", ((50, 1), (0, 18), (7, 1), (23, 9), (0, 2))),
    StateRows("mixed_with_padding", ((3, 4), (0, 5), (2, 1)), padding=(1,)),
    StateRows("no_rows", ()),
)


def each(slots: I32, query_start: I32, context_lens: I32) -> Iterator[tuple[int, slice, int, bool]]:
    """(row, its tokens, its slot, whether it begins from zero) of every row that is not padding."""
    for row, slot in enumerate(slots):
        if slot >= 0:
            tokens = slice(int(query_start[row]), int(query_start[row + 1]))
            yield row, tokens, int(slot), context_lens[row] == 0
