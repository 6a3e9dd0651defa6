"""Who guesses the tokens that come next: the model's own head, or the text so far."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ...platforms.interface_kv import I32


class Text(Protocol):
    """What a drafter may see of a row."""

    request_id: str
    tokens: I32
    known: int  # so many of `tokens` are there
    proposed: tuple[int, ...]  # what the model's head made of its last step


class Drafter(Protocol):
    """The hook of speculative decoding. A draft costs a token of a step and never changes an
    answer, whatever it is."""

    def propose(self, row: Text, most: int) -> tuple[int, ...]:
        """Guesses of the tokens that follow the row's known ones; at most `most`, maybe none."""
        ...


class HeadDrafter:
    """What the executor brought of the model's draft head with the row's last step."""

    def propose(self, row: Text, most: int) -> tuple[int, ...]:
        return row.proposed[:most]


class NgramDrafter:
    """Prompt lookup (Saxena, "Prompt Lookup Decoding", 2023): what followed the last few tokens
    where they stood before. For texts that repeat: code, quotations, extraction."""

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        self._sizes = range(longest, shortest - 1, -1)

    def propose(self, row: Text, most: int) -> tuple[int, ...]:
        """Of the longest run that stood before: where it stood last with enough behind it, else
        where it has most behind it."""
        known = row.tokens[: row.known]
        for size in self._sizes:
            ends = _ends_before(known, size)
            if len(ends):
                enough = ends[ends + most <= len(known)]
                begin = int(enough[-1] if len(enough) else ends[0])
                return tuple(known[begin : begin + most].tolist())
        return ()


def _ends_before(tokens: I32, size: int) -> I32:
    """Where the last `size` tokens ended before, ascending; something follows each."""
    last = len(tokens) - size
    if last < 1:
        return np.empty(0, np.int32)
    found = tokens[:last] == tokens[last]
    for i in range(1, size):
        found &= tokens[i : last + i] == tokens[last + i]
    return (np.flatnonzero(found) + size).astype(np.int32)


def make_drafter(name: str) -> Drafter:
    """`name` as in EngineConfig.draft."""
    return {"mtp": HeadDrafter, "ngram": NgramDrafter}[name]()
