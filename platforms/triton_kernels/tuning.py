"""How kernels are cut for one device: a row of `tuning.toml`, chosen by facts."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ...common.errors import KernelError
from ..interface import DeviceFacts

TABLE = Path(__file__).with_name("tuning.toml")


@dataclass(frozen=True, slots=True)
class Tile:
    """Of a product: rows, columns and depth of a block, and how it is run."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    block_k: int = 0

    @property
    def launch(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True, slots=True)
class Tuning:
    """One row with the device's lane width. `narrow` and `wide` are attention's: for rows with few
    queries, whose keys are cut into `splits` parts, and for blocks of queries. `linear` is of
    quantised matrices, `linear_narrow` for no more rows than one block has; `experts_many`
    where experts have that many rows on average."""

    name: str
    lane_width: int
    shared_bytes: int
    keys_bytes: int
    sums_bytes: int
    float32_dim: int
    vector_dim: int
    lane_elements: int
    most_warps: int
    row_elements: int
    splits: int
    least_blocks: int
    delta_single: int
    mhc_few: int
    mhc_slices: int
    narrow: Tile
    wide: Tile
    narrow_float32: Tile
    wide_float32: Tile
    linear_narrow: Tile
    linear: Tile
    linear_float32: Tile
    experts: Tile
    experts_many: Tile
    delta: Tile
    delta_chunk: Tile
    vectors: Tile
    vectors_wide: Tile
    mhc: Tile
    mhc_many: Tile
    index: Tile
    index_float32: Tile
    select: Tile
    pool: Tile

    def warps(self, elements: int) -> int:
        """Warps for a pointwise tile of so many elements, a power of two."""
        lanes = elements // self.lane_elements
        return at_most(max(1, min(self.most_warps, lanes // self.lane_width)))


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def at_most(n: int) -> int:
    """The largest power of two that is at most n; n >= 1."""
    return 1 << n.bit_length() - 1


def refusal(facts: DeviceFacts) -> str | None:
    """Why no row holds for a device, or None."""
    if _row(facts) is not None:
        return None
    kinds = sorted({row["kind"] for row in _table()["row"]})
    if facts.kind not in kinds:
        return f"there is no Triton compiler for {facts.kind} devices, only for {', '.join(kinds)}"
    ranges = "; ".join(_range(row) for row in _table()["row"] if row["kind"] == facts.kind)
    has = ".".join(map(str, facts.arch)) or "unknown"
    return f"architecture {has} of {facts.name} is in no row of tuning.toml ({ranges})"


def choose(facts: DeviceFacts) -> Tuning:
    """Raises KernelError with `refusal`."""
    row = _row(facts)
    if row is None:
        raise KernelError(f"No Triton kernels: {refusal(facts)}.")
    values = {**_table()["default"], **row}
    for key in ("kind", "from", "below"):
        values.pop(key, None)
    values = {key: Tile(**v) if isinstance(v, dict) else v for key, v in values.items()}
    return Tuning(lane_width=facts.lane_width, **values)


def _row(facts: DeviceFacts) -> Mapping[str, Any] | None:
    """A device whose architecture its driver did not tell is in no row."""
    found = [
        row
        for row in _table()["row"]
        if row["kind"] == facts.kind
        and tuple(row["from"]) <= facts.arch
        and ("below" not in row or facts.arch < tuple(row["below"]))
    ]
    return max(found, key=lambda row: row["from"], default=None)


def _range(row: Mapping[str, Any]) -> str:
    begin = ".".join(map(str, row["from"]))
    if "below" not in row:
        return f"{row['name']}: from {begin}"
    return f"{row['name']}: from {begin} and below {'.'.join(map(str, row['below']))}"


@cache
def _table() -> dict[str, Any]:
    return tomllib.loads(TABLE.read_text())
