"""Processes that work together, watched: one that is silent for too long is killed, one that ends
is named, and what each was doing is known. Nothing here knows what they do."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

START_S = 300.0
"""For a process to start, to import its framework and to open its device."""
ENDING_S = 10.0
"""From a process's last word to its end."""
STOPPED, RAISED, WRONG = range(3)
"""How failures are ordered: what stops a process is often why others raise."""


class Say(Enum):
    """The first of the two things that a process sends; the second is a text."""

    READY = "ready"  # the backend; the process then waits for one message before it goes on
    DOING = "doing"  # what it begins
    WRONG = "wrong"  # a result that is not right; it goes on
    RAISED = "raised"  # its last word
    DONE = "done"  # the number of cases; its last word


@dataclass(slots=True, eq=False)
class Member:
    rank: int
    process: BaseProcess
    pipe: Connection
    answered: float  # seconds of the monotonic clock
    doing: str = "starting"
    backend: str = ""
    cases: int = 0
    failures: list[tuple[int, str]] = field(default_factory=list)
    ended: bool = False

    def fail(self, order: int, text: str) -> None:
        self.failures.append((order, f"rank {self.rank}: {text}"))


Target = Callable[[int, Any, Connection], None]


def watch(target: Target, work: Sequence[Any], silence_s: float, start: str) -> list[Member]:
    """`target(rank, work[rank], pipe)` in a process each, until all have ended. What `target` and
    `work` are must be picklable."""
    context: Any = multiprocessing.get_context(start)
    members = [_started(context, target, rank, one) for rank, one in enumerate(work)]
    try:
        while waiting := [m for m in members if not m.ended]:
            limit = silence_s if all(m.backend for m in members) else START_S
            left = min(m.answered for m in waiting) + limit - time.monotonic()
            heard = connection.wait([m.pipe for m in waiting], max(left, 0.0))
            for member in waiting:
                if member.pipe in heard:
                    _hear(member, members)
                elif time.monotonic() - member.answered > limit:
                    _stop(member, limit)
            _release(members)
    finally:
        for member in members:
            if member.process.is_alive():
                member.process.kill()
            member.process.join()
            member.pipe.close()
    return members


def _started(context: Any, target: Target, rank: int, work: Any) -> Member:
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(rank, work, theirs), daemon=True)
    process.start()
    theirs.close()  # else its end would not be seen here
    return Member(rank, process, ours, time.monotonic())


def _hear(member: Member, members: Sequence[Member]) -> None:
    member.answered = time.monotonic()
    try:
        kind, text = member.pipe.recv()
    except (EOFError, OSError):
        return _end(member)
    if kind is Say.READY:
        member.backend, member.doing = text, "waiting for the others to start"
        if all(m.backend for m in members):
            for one in members:
                one.answered = time.monotonic()
                with contextlib.suppress(OSError):  # it has died, which is heard next
                    one.pipe.send(None)
    elif kind is Say.DOING:
        member.doing = text
    elif kind is Say.WRONG:
        member.fail(WRONG, text)
    elif kind is Say.RAISED:
        member.doing = ""
        member.fail(RAISED, text)
    else:
        member.doing, member.cases = "", int(text)
    return None


def _end(member: Member) -> None:
    """Its pipe is closed. Without a last word it died."""
    member.ended = True
    member.process.join(ENDING_S)
    if member.process.is_alive():
        member.fail(STOPPED, f"did not end within {ENDING_S:g} s; killed")
    elif member.doing:
        status = member.process.exitcode
        member.fail(STOPPED, f"its process ended with status {status} in: {member.doing}")


def _stop(member: Member, limit: float) -> None:
    member.ended = True
    member.process.kill()
    member.fail(STOPPED, f"no answer for {limit:g} s in: {member.doing}; killed")


def _release(members: Sequence[Member]) -> None:
    """Where one ended before all were ready, the others would wait for it for ever."""
    if any(m.ended for m in members) and not all(m.backend for m in members):
        for member in members:
            if not member.ended and member.backend:
                member.ended = True
                member.process.kill()
                member.fail(RAISED, "was not begun: another rank did not start")
