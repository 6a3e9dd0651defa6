"""The measurement: every workload on every peer, round by round, the order turned each time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractContextManager
from typing import Any

from .client import Outcome, run
from .launchers import Peer

Results = dict[str, dict[str, list[Outcome]]]
"""peer -> workload -> its outcomes, one a round."""

Runner = Callable[[str, str, str, int], Coroutine[Any, Any, Outcome]]
"""(api, model, workload, seed)"""


def measure(
    peers: Sequence[Peer],
    workloads: str,
    rounds: int,
    turn: Callable[[str], AbstractContextManager[None]],
    tell: Callable[[str], None],
    runner: Runner = run,
) -> Results:
    """Run the workloads (S is none of them: it is measured as servers start).

    Odd rounds go through the peers backwards (A B, B A), so that what drifts on the machine, such
    as its clock, meets all of them alike. `turn` says whose turn it is, by name.
    """
    sent = [workload for workload in workloads if workload != "S"]
    results: Results = {peer.name: {workload: [] for workload in sent} for peer in peers}
    for number in range(rounds):
        for workload in sent:
            for peer in peers if number % 2 == 0 else reversed(peers):
                with turn(peer.name):
                    outcome = asyncio.run(runner(peer.api, peer.model, workload, number))
                results[peer.name][workload].append(outcome)
                tell(_line(peer.name, outcome))
    return results


def _line(name: str, outcome: Outcome) -> str:
    first = [reply.first_s for reply in outcome.good]
    figures = [f"{outcome.tokens_per_s:8.1f} tok/s", f"{outcome.wall_s:7.1f} s"]
    if first:
        figures.append(f"first token after {min(first):.2f} to {max(first):.2f} s")
    if outcome.errors:
        figures.append(f"{outcome.errors} errors")
    return f"round {outcome.round + 1} {outcome.workload} {name:16s} {'  '.join(figures)}"
