"""Collectives against sums in numpy: one process per device, watched from outside.

Values are whole numbers, small enough that every sum is exact in every dtype for up to 42 devices.
This file imports torch only in the members' processes.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..interface_collectives import CollectivesFound
from .members import Say, watch

if TYPE_CHECKING:
    from .collectives import Collectives, Seat
    from .device import TorchDevice

OPS = ("all_reduce", "all_gather", "broadcast")
MEBIBYTE = 1 << 20
LARGEST = 3
LIMIT_S = 60.0
Opener = Callable[[], "TorchDevice"]
"""Makes one device; pickled, since a process of its own calls it."""
Join = Callable[["TorchDevice", "Seat"], "Collectives"]


@dataclass(frozen=True, slots=True)
class Case:
    op: str
    elements: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.op} of {self.elements} {self.dtype}"


def cases(bytes_of: dict[str, int]) -> list[Case]:
    """By dtype the bytes of one element."""
    return [
        Case(op, elements, dtype)
        for dtype, size in bytes_of.items()
        for elements in (1, 1001, MEBIBYTE // size)
        for op in OPS
    ]


def given(case: Case, rank: int) -> NDArray[np.float32]:
    """(elements,): what a rank brings, never 0. The first element is not its neighbours', so that
    also of one element a result that was never exchanged is wrong."""
    draw = np.random.default_rng((rank, case.elements))
    signs, sizes = draw.integers(0, 2, case.elements), draw.integers(1, LARGEST + 1, case.elements)
    brought = ((2 * signs - 1) * sizes).astype(np.float32)
    brought[0] = 1 + rank % LARGEST
    return brought


def expected(case: Case, world: int) -> NDArray[np.float32]:
    """The same on every rank. The root of a broadcast is the last rank."""
    brought = np.stack([given(case, rank) for rank in range(world)])
    if case.op == "all_reduce":
        return np.asarray(brought.sum(0))
    return brought if case.op == "all_gather" else np.asarray(brought[world - 1])


def difference(seen: NDArray[Any], right: NDArray[np.float32]) -> str:
    """ "" where they are equal. The first index of a gathered element is the rank it is of."""
    if seen.shape != right.shape:
        return f"shape {seen.shape} instead of {right.shape}"
    wrong = np.argwhere(seen != right)  # NaN differs from every number
    if not len(wrong):
        return ""
    at = tuple(int(i) for i in wrong[0])
    count = f"{len(wrong)} of {right.size} elements differ"
    return f"{count}, the first at {at}: {seen[at]} instead of {right[at]}"


def check(
    openers: Sequence[Opener],
    join: Join | None = None,
    limit_s: float = LIMIT_S,
    start: str = "spawn",
) -> CollectivesFound:
    """Blocks until every process has ended, or was killed: one that is silent for 1.5 * `limit_s`
    seconds. `join` None: `Collectives`; `start`: a start method of `multiprocessing`."""
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        work = [(opener, join, (len(openers), store, limit_s)) for opener in openers]
        members = watch(member, work, 1.5 * limit_s, start)
    failures = [one for m in members for one in m.failures]
    return CollectivesFound(
        backend=next((m.backend for m in members if m.backend), ""),
        devices=len(members),
        cases=min(m.cases for m in members),
        failures=tuple(text for _, text in sorted(failures, key=lambda f: f[0])),
    )


def member(
    rank: int, work: tuple[Opener, Join | None, tuple[int, str, float]], pipe: Connection
) -> None:
    """The process of one device. Says what it does before it does it."""
    try:
        _run(rank, work, pipe)
        pipe.close()
    except Exception as error:
        pipe.send((Say.RAISED, f"{type(error).__name__}: {error}"))
        pipe.close()
        os._exit(1)  # destructors of a broken group may wait for a peer that is gone


def _run(
    rank: int, work: tuple[Opener, Join | None, tuple[int, str, float]], pipe: Connection
) -> None:
    opener, join, (world, store, limit_s) = work
    device = opener()
    device.attach()
    pipe.send((Say.READY, device.collectives))
    pipe.recv()  # until all are ready: how long a process takes to start does not count
    from .collectives import Collectives, Seat

    pipe.send((Say.DOING, "joining"))
    group = (join or Collectives)(device, Seat(rank, world, store, limit_s))
    todo = cases(_dtypes(device))
    for case in todo:
        pipe.send((Say.DOING, str(case)))
        if wrong := difference(_result(group, case), expected(case, world)):
            pipe.send((Say.WRONG, f"{case}: {wrong}"))
    pipe.send((Say.DOING, "leaving"))
    group.close()
    pipe.send((Say.DONE, str(len(todo))))


def _dtypes(device: TorchDevice) -> dict[str, int]:
    """The device's dtypes that models use, and the bytes of one element."""
    from .dtypes import KV_DTYPES

    return {name: d.itemsize for name, d in KV_DTYPES.items() if name in device.facts.dtypes}


def _result(group: Collectives, case: Case) -> NDArray[Any]:
    from .dtypes import KV_DTYPES

    device, world = group.device, group.seat.world
    tensor = device.to_device(given(case, group.seat.rank)).to(KV_DTYPES[case.dtype])
    if case.op == "broadcast":
        result = group.broadcast(tensor, world - 1)
    else:
        result = getattr(group, case.op)(tensor)
    return np.asarray(device.to_host(result.float()))
