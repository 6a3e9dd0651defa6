"""Which instructions of a recording may run without waiting for one another.

Between two instructions all threads meet. That costs a microsecond or two, and a small instruction
leaves threads idle, so a decode step of one row would spend a tenth of its time there.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence

from .native_library import Instruction
from .native_ops import ANGLES, EMBED, GATE, KV_WRITE, LINEAR, QUANTISE, RMS_NORM, ROPE

BY_ROW = {EMBED, RMS_NORM, ANGLES, ROPE, GATE, QUANTISE, KV_WRITE}
"""Ops that read and write one row of each buffer at a time; buffers that share memory have equal
rows, so a row may go through several of them at once."""

X, OUT, QUANTISED = 0, 3, 5
"""Arguments of LINEAR that lie in the recording's own buffers."""


def order(tape: Sequence[Instruction], buffer_of: Callable[[int], int]) -> None:
    """Sets `chain` and `ahead` in place. `buffer_of` an address names the buffer it lies in."""
    _chain_rows(tape)
    _let_linears_overlap(tape, buffer_of)


def buffer_finder(spans: Sequence[tuple[int, int]]) -> Callable[[int], int]:
    """spans: (address, bytes) of the buffers. An address outside all of them names itself."""
    known = sorted(spans)
    starts = [start for start, _ in known]

    def find(address: int) -> int:
        at = bisect_right(starts, address) - 1
        if at >= 0 and address < starts[at] + known[at][1]:
            return starts[at]
        return address

    return find


def _chain_rows(tape: Sequence[Instruction]) -> None:
    leader: Instruction | None = None
    for instruction in tape:
        if instruction.op not in BY_ROW:
            leader = None
        elif leader is None:
            leader = instruction
        else:
            leader.chain += 1


def _let_linears_overlap(tape: Sequence[Instruction], buffer_of: Callable[[int], int]) -> None:
    """Neighbouring linear layers that need nothing of each other: q, k, v; gate, up."""
    reads: set[int] = set()
    writes: set[int] = set()
    previous: Instruction | None = None
    for instruction in tape:
        if instruction.op != LINEAR:
            previous = None
            continue
        inputs = {buffer_of(instruction.a[X]), buffer_of(instruction.a[QUANTISED])} - {0}
        output = buffer_of(instruction.a[OUT])
        if previous is None or output in reads | writes or inputs & writes:
            reads, writes = set(), set()
        else:
            previous.ahead = 1
        reads |= inputs
        writes.add(output)
        previous = instruction
