"""The comparison on paper: a Markdown table for people, a JSON file for programs."""

from __future__ import annotations

import json
import platform
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from ... import __version__
from .launchers import Peer, usable_cores
from .rounds import Results
from .summary import Row, Start
from .workloads import TITLES

WARM_SHARE = 0.25
"""A cold workload whose prompts were cached beyond this share was not cold."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """All that was measured, and all that was not."""

    settings: dict[str, Any]
    peers: tuple[Peer, ...]
    left_out: dict[str, str]  # name -> why
    rows: tuple[Row, ...]
    starts: tuple[Start, ...]
    ended: dict[str, str]  # peers that ended while being measured, with their log's end
    results: Results

    @property
    def errors(self) -> int:
        return sum(row.errors for row in self.rows)


def machine() -> dict[str, Any]:
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": usable_cores(),
        "sixfold": __version__,
        "date": date.today().isoformat(),
    }


def write_json(comparison: Comparison, path: Path) -> None:
    """`rows` and `starts` as in the table; `runs` has every reply with its text and arrivals."""
    runs = {
        name: {
            workload: [asdict(outcome) for outcome in outcomes] for workload, outcomes in d.items()
        }
        for name, d in comparison.results.items()
    }
    content = {
        "settings": comparison.settings,
        "machine": machine(),
        "peers": [asdict(peer) for peer in comparison.peers],
        "left_out": comparison.left_out,
        "ended": comparison.ended,
        "rows": [asdict(row) for row in comparison.rows],
        "starts": [asdict(start) for start in comparison.starts],
        "runs": runs,
    }
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False), "utf-8")


def markdown(comparison: Comparison) -> str:
    settings, here = comparison.settings, machine()
    how = ["1 round" if settings["rounds"] == 1 else f"{settings['rounds']} rounds, interleaved"]
    how += [f"{name} {settings[name]}" for name in ("dtype", "quantize") if settings[name]]
    parts = [
        f"# {settings['model']}: Sixfold and its peers\n",
        f"Sixfold {here['sixfold']}, {here['date']}; {here['system']}, {here['cores']} cores; "
        f"{', '.join(how)}.\n",
    ]
    if comparison.rows:
        parts.append(_requests_table(comparison.rows))
        parts.append(_legend(settings["workloads"]))
    if comparison.starts:
        parts.append(_starts_table(comparison.starts))
    parts += _notes(comparison)
    parts.append(_commands(comparison.peers))
    return "\n".join(parts)


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] * 2 + ["---:"] * (len(header) - 2)
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *lines)) + "\n"


def _requests_table(rows: Sequence[Row]) -> str:
    header = (
        "workload", "peer", "output tok/s", "TTFT p50, ms", "TTFT p99, ms", "decode tok/s",
        "likeness", "errors", "Sixfold ÷ best peer",
    )  # fmt: skip
    lines = [
        (
            row.workload,
            row.peer,
            _number(row.tokens_per_s),
            _number(row.ttft_p50_s, 1000),
            _number(row.ttft_p99_s, 1000),
            _number(row.decode_tokens_per_s),
            _number(row.likeness, digits=3),
            f"{row.errors} of {row.requests}" if row.errors else "0",
            _number(row.ratio, digits=2),
        )
        for row in rows
    ]
    return _table(header, lines)


def _starts_table(starts: Sequence[Start]) -> str:
    header = (
        "workload", "peer", "launch → first token, s", "resident memory, GB",
        "Sixfold ÷ best peer: start", "memory",
    )  # fmt: skip
    lines = [
        (
            "S",
            start.peer,
            _number(start.cold_start_s, digits=2),
            _number(start.resident_bytes, 1e-9, digits=2),
            _number(start.cold_start_ratio, digits=2),
            _number(start.resident_ratio, digits=2),
        )
        for start in starts
    ]
    return _table(header, lines)


def _number(value: float | None, scale: float = 1.0, digits: int = 1) -> str:
    return "-" if value is None else f"{scale * value:,.{digits}f}"


def _legend(workloads: str) -> str:
    lines = [f"{letter}: {TITLES[letter]}." for letter in workloads]
    return (
        " ".join(lines)
        + "\n\nOutput tok/s: median of the rounds. TTFT: time to first token, over all requests. "
        "Decode: 1 ÷ median time between tokens.\nLikeness: of the texts to those of the first "
        "peer, 1 = all equal. Ratio: above 1, Sixfold is ahead; a peer with errors takes no part.\n"
    )


def _notes(comparison: Comparison) -> list[str]:
    notes = [f"Left out: {name}: {reason}" for name, reason in comparison.left_out.items()]
    notes += [
        f"{name} ended while it was measured: {why}" for name, why in comparison.ended.items()
    ]
    notes += [
        f"{row.peer}, {row.workload}: {row.errors} of {row.requests} requests failed, the first "
        f"with: {(row.first_error or '')[:160]}"
        for row in comparison.rows
        if row.errors
    ]
    notes += [
        f"{row.peer}, {row.workload}: {row.cached_share:.0%} of the prompt tokens came from its "
        "cache, so these are not the figures of cold prompts (did it serve this comparison before?)"
        for row in comparison.rows
        if row.workload[0] in "ABCP" and (row.cached_share or 0) > WARM_SHARE
    ]
    return [f"- {note}\n" for note in notes]


def _commands(peers: Sequence[Peer]) -> str:
    lines = [
        f"{peer.name}: {shlex.join(peer.command) if peer.command else f'{peer.api} (was running)'}"
        for peer in peers
    ]
    return "```\n" + "\n".join(lines) + "\n```\n"
