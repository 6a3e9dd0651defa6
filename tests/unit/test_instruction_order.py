"""Guards what a recorded step may run without its threads meeting: rows in chains, linear layers
that need nothing of each other; and nothing more than that."""

from __future__ import annotations

import pytest

from sixfold.platforms.cpu.instruction_order import buffer_finder, order
from sixfold.platforms.cpu.native_library import Instruction, instruction
from sixfold.platforms.cpu.native_ops import (
    ATTENTION,
    GATE,
    KV_WRITE,
    LINEAR,
    MERGE,
    QUANTISE,
    RMS_NORM,
    ROPE,
)

A, B, C, D, E = (1000 * i for i in range(1, 6))
"""Addresses of buffers of 100 bytes."""

FIND = buffer_finder([(start, 100) for start in (C, A, E, B, D)])


def linear(x: int, out: int, quantised: int = 0) -> Instruction:
    return instruction(LINEAR, -1, (x, 8, 7, out, 8, quantised))


def ordered(*tape: Instruction) -> tuple[list[int], list[int]]:
    order(tape, FIND)
    return [i.chain for i in tape], [i.ahead for i in tape]


def test_an_address_belongs_to_the_buffer_around_it() -> None:
    assert [FIND(a) for a in (A, A + 99, A + 100, A - 1, E + 50)] == [A, A, A + 100, A - 1, E]
    assert buffer_finder([])(5) == 5


def test_ops_that_go_row_by_row_are_chained() -> None:
    ops = [RMS_NORM, QUANTISE, LINEAR, ROPE, KV_WRITE, ATTENTION, MERGE, QUANTISE, LINEAR, GATE]
    chains, _ = ordered(*(instruction(op, -1, ()) for op in ops))
    assert chains == [1, 0, 0, 1, 0, 0, 0, 0, 0, 0]


def test_neighbours_on_the_same_input_overlap() -> None:
    _, ahead = ordered(linear(A, B, E), linear(A, C, E), linear(A, D, E), instruction(GATE, -1, ()))
    assert ahead == [1, 1, 0, 0], "what follows the last one needs all of them"


@pytest.mark.parametrize(
    ("second", "why"),
    [
        (linear(B, C), "it reads what the first writes"),
        (linear(B + 40, C), "it reads a part of what the first writes"),
        (linear(A, C, quantised=B), "it reads a rounded form in the first one's output"),
        (linear(C, A), "it writes what the first reads"),
        (linear(C, D), ""),
        (linear(C, B), "both write one buffer"),
    ],
)
def test_neighbours_that_share_a_buffer_wait(second: Instruction, why: str) -> None:
    _, ahead = ordered(linear(A, B), second)
    assert ahead == [0 if why else 1, 0]


def test_the_third_waits_for_the_first() -> None:
    _, ahead = ordered(linear(A, B), linear(A, C), linear(B, D))
    assert ahead == [1, 0, 0]
