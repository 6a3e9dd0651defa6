"""Machines recorded in `tests/facts/*.toml`, read and written.

    python tests/support/recorded_machines.py > tests/facts/NAME.toml

records the machine it runs on; then fill in its header (which machine, when) and `[expect]`.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sixfold.platforms.interface import Accelerator, Machine

FACTS = Path(__file__).resolve().parent.parent / "facts"


@dataclass(frozen=True, slots=True)
class Expected:
    """What selection must say. Texts are parts that must occur."""

    chosen: str = ""
    because: tuple[str, ...] = ()
    error: tuple[str, ...] = ()
    others: dict[str, str] | None = None  # platform -> part of its reason
    remedies: dict[str, str] | None = None
    device: dict[str, Any] | None = None  # fields of the chosen platform's first DeviceFacts


def names() -> list[str]:
    return sorted(path.stem for path in FACTS.glob("*.toml"))


def header(name: str) -> str:
    """The comment that a file begins with."""
    lines = (FACTS / f"{name}.toml").read_text().splitlines()
    return " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))


def load(name: str) -> tuple[Machine, Expected]:
    record = tomllib.loads((FACTS / f"{name}.toml").read_text())
    expect = {k: tuple(v) if isinstance(v, list) else v for k, v in record["expect"].items()}
    return machine_from(record["machine"]), Expected(**expect)


def machine_from(record: dict[str, Any]) -> Machine:
    """A Machine from its `[machine]` table."""
    values = {"packages": {}, **record}
    values["cpu_features"] = frozenset(values["cpu_features"])
    values["accelerators"] = tuple(Accelerator(**a) for a in values.get("accelerators", ()))
    for field in ("device_nodes", "denied_nodes"):
        values[field] = tuple(values.get(field, ()))
    return Machine(**values)


def dump(machine: Machine) -> str:
    """The `[machine]` part of a file. TOML spells these values as JSON does."""
    lines, tables = ["[machine]"], []
    for field in fields(machine):
        value = getattr(machine, field.name)
        if isinstance(value, frozenset):
            value = sorted(value)
        if field.name == "accelerators":
            for accelerator in value:
                tables += ["", "[[machine.accelerators]]"]
                pairs = [(f.name, getattr(accelerator, f.name)) for f in fields(accelerator)]
                tables += [f"{name} = {json.dumps(v)}" for name, v in pairs]
        elif field.name in ("packages", "tools"):
            tables += ["", f"[machine.{field.name}]"]
            tables += [f"{json.dumps(name)} = {json.dumps(v)}" for name, v in value.items()]
        else:
            lines.append(f"{field.name} = {json.dumps(value)}")
    return "\n".join([*lines, *tables]) + "\n"


if __name__ == "__main__":
    from sixfold.platforms.machine import observe

    print(dump(observe()), end="")
