"""`sixfold doctor`: what this machine can run, what is missing for the rest, how to mend it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import __version__
from ..common.decisions import to_record
from ..common.errors import PlatformError
from ..platforms import machine as machines
from ..platforms import select
from ..platforms.interface import Accelerator, Decision, Machine, Probe


@dataclass(frozen=True, slots=True)
class Diagnosis:
    machine: Machine
    found: Mapping[str, Probe]
    choice: Decision | None  # what `serve` would take
    problem: str  # why it would refuse, "" when there is a choice

    @property
    def usable(self) -> bool:
        return any(probe.usable for probe in self.found.values())


def diagnose(machine: Machine) -> Diagnosis:
    found = select.probe_all(machine)
    try:
        return Diagnosis(machine, found, select.choose(found), "")
    except PlatformError as error:
        return Diagnosis(machine, found, None, str(error).splitlines()[0])


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
def doctor(as_json: bool) -> None:
    """Show what this machine can run, and what is missing for the rest."""
    diagnosis = diagnose(machines.observe())
    if as_json:
        click.echo(json.dumps(record(diagnosis), indent=2))
    else:
        show(diagnosis, Console(highlight=False, markup=False))
    sys.exit(0 if diagnosis.usable else 1)


def record(diagnosis: Diagnosis) -> dict[str, Any]:
    """The diagnosis as plain JSON values."""
    choice = diagnosis.choice
    platforms = {name: asdict(probe) for name, probe in diagnosis.found.items()}
    for platform in platforms.values():
        platform["remedy"] = platform["remedy"].splitlines()
    plain = {
        "version": __version__,
        "machine": asdict(diagnosis.machine),
        "platforms": platforms,
        "serve": to_record(choice) if choice else {"chosen": None, "because": diagnosis.problem},
    }
    result: dict[str, Any] = json.loads(json.dumps(plain, default=sorted))
    return result


def show(diagnosis: Diagnosis, console: Console) -> None:
    """Commands stand unwrapped on lines of their own, so that they can be copied."""
    for line in summary(diagnosis.machine):
        console.print(line, soft_wrap=True)
    console.print()
    console.print(_table(diagnosis))
    console.print()
    choice = diagnosis.choice
    if choice is not None:
        sentence = f"`sixfold serve` uses {choice.chosen}: {choice.because}."
    else:
        sentence = f"`sixfold serve` refuses: {diagnosis.problem}"
    console.print(Text(sentence, "bold green" if choice else "bold red"))
    blank = [name for name, probe in diagnosis.found.items() if not (probe.usable or probe.found)]
    for name, probe in diagnosis.found.items():
        if name not in blank:
            _details(name, probe, console)
    if blank:
        console.print()
        console.print(Text("nothing found for the rest", "bold"))
    for name in blank:
        for line in diagnosis.found[name].remedy.splitlines():
            console.print(Text(f"  {name + ':':9}{line}"), soft_wrap=True)


def summary(machine: Machine) -> list[str]:
    cores = f"{machine.physical_cores} cores, {machine.logical_cores} threads"
    lines = [
        f"Sixfold {__version__} on {machine.os_version}, {machine.arch}, Python {machine.python}",
        f"processor: {machine.cpu_name}, {cores}",
        f"memory: {_gib(machine.memory_bytes)}, {_gib(machine.available_bytes)} available",
    ]
    labels = [_label(accelerator) for accelerator in machine.accelerators]
    for label in dict.fromkeys(labels):
        count = labels.count(label)
        lines.append("accelerator: " + (f"{count} x {label}" if count > 1 else label))
    return lines if labels else [*lines, "accelerator: none found"]


def _label(accelerator: Accelerator) -> str:
    size = _gib(accelerator.memory_bytes) if accelerator.memory_bytes else ""
    driver = f"driver {accelerator.driver}" if accelerator.driver else "no driver"
    return ", ".join(filter(None, (accelerator.name, accelerator.arch, size, driver)))


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _table(diagnosis: Diagnosis) -> Table:
    table = Table("platform", "state", "why", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name, probe in diagnosis.found.items():
        chosen = diagnosis.choice is not None and diagnosis.choice.chosen == name
        state = "chosen" if chosen else "usable" if probe.usable else "no"
        style = "green" if probe.usable else "dim"
        table.add_row(Text(name, style), Text(state, style), Text(probe.reason))
    return table


def _details(name: str, probe: Probe, console: Console) -> None:
    console.print()
    console.print(Text(name, "bold"))
    rows = [("found", probe.found), ("missing", probe.missing)]
    for label, lines in (*rows, ("mend", probe.remedy.splitlines())):
        for line in lines:
            console.print(Text(f"  {label + ':':9}{line}"), soft_wrap=True)
