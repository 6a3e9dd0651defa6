"""The whole comparison: start the servers, measure in rounds, stop them, sum up."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from ...common.errors import SixfoldError
from . import summary
from .launchers import Peer, Wanted, choose
from .processes import Crew, PeerFailed
from .report import Comparison
from .rounds import measure

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    wanted: Wanted
    workloads: str  # as workloads.parse returns them
    rounds: int
    out: str  # prefix of the files

    def settings(self) -> dict[str, Any]:
        wanted = self.wanted
        return {
            "model": Path(wanted.model).name or "demo model",
            "workloads": self.workloads,
            "rounds": self.rounds,
            "dtype": wanted.dtype,
            "quantize": wanted.quantize,
        }


def compare(plan: Plan, tell: Tell) -> Comparison:
    """Measure every peer there is; the ones left out are in the result, with the reason.

    Raises SixfoldError when no peer is left. All servers that it started are stopped at its end,
    also after Ctrl-C and SIGTERM.
    """
    chosen, left_out = choose(plan.wanted)
    for name, reason in left_out.items():
        tell(f"left out: {name}: {reason}")
    with _termination(), Crew() as crew:
        peers = []
        for peer in chosen:
            try:
                peers.append(_ready(peer, plan.out, crew, tell))
            except PeerFailed as error:
                left_out[peer.name] = str(error)
                tell(f"left out: {peer.name}: {error}")
        if not peers:
            raise SixfoldError("No peer is left to measure.")
        results = measure(peers, plan.workloads, plan.rounds, crew.turn, tell)
        servers = crew.servers()
        held = {
            name: (s.cold_start_s, s.resident_bytes()) for name, s in servers.items() if s.alive
        }
        ended = {name: s.failure("its log") for name, s in servers.items() if not s.alive}
    starts = summary.starts({peer.name: held.get(peer.name) for peer in peers})
    return Comparison(
        settings=plan.settings(),
        peers=tuple(peers),
        left_out=left_out,
        rows=tuple(summary.rows(results)),
        starts=tuple(starts) if "S" in plan.workloads else (),
        ended=ended,
        results=results,
    )


def _ready(peer: Peer, out: str, crew: Crew, tell: Tell) -> Peer:
    """Start a peer, or look whether it answers. Raises PeerFailed."""
    if not peer.command:
        return replace(peer, model=peer.model or _served(peer.api))
    tell(f"starting {peer.name} ...")
    server = crew.start(peer, Path(f"{out}.{peer.name}.log"))
    tell(f"ready: {peer.name} after {server.cold_start_s:.1f} s")
    return server.peer


def _served(api: str) -> str:
    try:
        return str(httpx.get(f"{api}/models", timeout=30).json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
        raise PeerFailed(f"{api}/models does not tell which models it serves ({error})") from None


@contextlib.contextmanager
def _termination() -> Iterator[None]:
    """SIGTERM and a closed terminal end us as Ctrl-C does, so that no server is left behind."""

    def end(number: int, frame: object) -> None:
        sys.exit(128 + number)

    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # as under nohup
            signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
