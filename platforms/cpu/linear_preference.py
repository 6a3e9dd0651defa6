"""The order in which a CPU's linear kernels are preferred, from measurements that are checked in.

A provider holds the only copy of a matrix in a form of its own, so it is chosen when the weights
are loaded and not by the rows of a step.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ...common.errors import KernelError
from ..interface import Decision
from .native_library import LEVELS

FILE = Path(__file__).with_name("linear_preference.toml")
PROVIDERS = frozenset({"native", "onednn", "generic"})
STEP = 10
"""Between the priorities of neighbours; the generic kernel's is 0 whatever its place."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One instruction-set level: weights scheme -> providers, best first."""

    level: str
    cpu: str
    date: str
    order: dict[str, tuple[str, ...]]
    ratio: dict[str, str]

    @property
    def source(self) -> str:
        return f"measured on {self.cpu}, {self.date}"


def read(text: str) -> tuple[Measured, ...]:
    """Raises KernelError, naming what is wrong and what there is."""
    levels = [name for name, _ in LEVELS]
    rows = []
    for entry in tomllib.loads(text)["measured"]:
        order, ratio = {}, {}
        _known("level", entry["level"], levels)
        for scheme, found in entry["linear"].items():
            for provider in found["order"]:
                _known(f"{entry['level']} {scheme}: provider", provider, sorted(PROVIDERS))
            order[scheme], ratio[scheme] = tuple(found["order"]), found["ratio"]
        if set(order.get("float32", ())) != PROVIDERS:
            raise KernelError(
                f"{FILE.name}: {entry['level']} float32 must order {', '.join(sorted(PROVIDERS))}."
            )
        rows.append(Measured(entry["level"], entry["cpu"], str(entry["date"]), order, ratio))
    return tuple(rows)


def _known(what: str, name: str, names: list[str]) -> None:
    if name not in names:
        raise KernelError(f"{FILE.name}: {what} {name!r}; there are: {', '.join(names)}.")


@cache
def table() -> tuple[Measured, ...]:
    return read(FILE.read_text())


@dataclass(frozen=True, slots=True)
class Preference:
    level: str  # of this machine
    row: Measured  # of this level, or of the nearest one that was measured

    @property
    def priorities(self) -> dict[str, int]:
        """Provider -> priority. Weights other than float32 have one provider, so one order does."""
        order = self.row.order["float32"]
        return {name: STEP * (order.index("generic") - i) for i, name in enumerate(order)}

    @property
    def decision(self) -> Decision:
        because = f"{self.row.source}: {self.row.ratio['float32']}"
        if self.row.level != self.level:
            because = f"nobody has measured this on {self.level}; as on {self.row.level}, {because}"
        return Decision("order of linear kernels", ", ".join(self.row.order["float32"]), because)


def preference(features: frozenset[str], rows: tuple[Measured, ...] | None = None) -> Preference:
    """For a CPU with these features; the nearest level is that of the fewest steps in LEVELS."""
    levels = [name for name, _ in LEVELS]
    level = next(name for name, needs in LEVELS if needs <= features)
    here = levels.index(level)
    row = min(rows or table(), key=lambda row: abs(levels.index(row.level) - here))
    return Preference(level, row)
