"""The record of every choice made at start-up, and its one text form.

`sixfold doctor`, `serve --explain` and `GET /v1/platform` show the same records.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from ..platforms.interface import Decision

__all__ = ["Decision", "DecisionLog", "from_record", "to_record"]


class DecisionLog:
    """Collects decisions in order. A second decision about the same thing is a bug."""

    def __init__(self, decisions: Iterable[Decision] = ()) -> None:
        self._records: dict[str, Decision] = {}
        self.extend(decisions)

    def add(
        self,
        what: str,
        chosen: object,
        because: str,
        rejected: Iterable[tuple[str, str]] = (),
        fallback: bool = False,
    ) -> None:
        self.extend([Decision(what, str(chosen), because, tuple(rejected), fallback)])

    def extend(self, decisions: Iterable[Decision]) -> None:
        for decision in decisions:
            if decision.what in self._records:
                raise ValueError(f"{decision.what!r} was decided twice")
            self._records[decision.what] = decision

    def __iter__(self) -> Any:
        return iter(self._records.values())

    def fallbacks(self) -> list[Decision]:
        return [d for d in self._records.values() if d.fallback]


def to_record(decision: Decision) -> dict[str, Any]:
    return asdict(decision)


def from_record(record: dict[str, Any]) -> Decision:
    rejected = tuple((str(c), str(r)) for c, r in record["rejected"])
    return Decision(
        record["what"], record["chosen"], record["because"], rejected, record["fallback"]
    )
