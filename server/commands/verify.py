"""`sixfold verify`: what a person with a device runs, and the file that they send."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path

import click

from ... import __version__
from ...common import evidence
from ...common.errors import ConfigError
from ...common.evidence import Report, Result
from ...platforms import machine as machines
from ...platforms import select
from .. import verification
from ..doctor import summary

LINE = "{name:11} {state:8} {seconds:6.1f} s   {said}"


@click.command()
@click.argument("model", default="")
@click.option("--platform", help="Hardware to verify; the best usable one if not given.")
@click.option("--dtype", help="Weights and activations: float32, bfloat16 or float16.")
@click.option(
    "--workloads",
    "only",
    default="",
    help=f"Some parts, with commas: {', '.join(verification.PARTS)}.",
)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="The report's file.")
def verify(
    model: str, platform: str | None, dtype: str | None, only: str, out: Path | None
) -> None:
    """Kernels, a model's answers and its speed on this machine, as one report to send back.

    MODEL is the demo model if not given: of that one the right answers are known. Exit status: 0
    everything passed, 1 something failed or the platform cannot serve here.
    """
    parts = chosen_parts(only)
    machine = machines.observe()
    found = select.probe_all(machine)
    decision = select.choose(found, platform)
    for line in summary(machine):
        click.echo(line)
    click.echo(f"platform: {decision.chosen}: {decision.because}\n")
    report = Report(
        decision.chosen,
        evidence.machine_name(machine),
        datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        f"version {__version__}",
        evidence.versions(machine, __version__),
        evidence.facts(machine, found[decision.chosen]),
    )
    path = out or Path(f"sixfold-verify-{report.platform}.json")
    report.write(path)  # what cannot be written is found before the work
    wanted = verification.Wanted(decision.chosen, model, dtype)
    for name, result in verification.run(wanted, parts):
        report.results[name] = result
        report.write(path)
        click.echo(line_of(name, result))
    click.echo(f"\nThe report, to send back: {path}")
    sys.exit(1 if report.failed else 0)


def chosen_parts(only: str) -> list[str]:
    """Raises ConfigError for a part that there is not."""
    parts = [name.strip() for name in only.split(",") if name.strip()]
    if unknown := [name for name in parts if name not in verification.PARTS]:
        listed = ", ".join(verification.PARTS)
        raise ConfigError(f"--workloads: no part {', '.join(unknown)}; there are {listed}.")
    return parts or list(verification.PARTS)


def line_of(name: str, result: Result) -> str:
    said = result.reason or said_of(name, result)
    state = result.state.upper() if result.state == "failed" else result.state
    return LINE.format(name=name, state=state, seconds=result.seconds, said=said)


def said_of(name: str, result: Result) -> str:
    figures = result.figures
    if name == "kernels":
        return f"{figures['cases']} cases on {figures['kernels']} kernels"
    if name == "collectives":
        return f"{figures['cases']} cases on {figures['devices']} devices over {figures['backend']}"
    if name == "answers":
        return f"{figures['answer']!r}; mean log-probability {figures['mean log-probability']}"
    rates = {k: v["output tokens/s"] for k, v in figures.items() if k.endswith("streams")}
    return "; ".join(f"{streams}: {rate} output tokens/s" for streams, rate in rates.items())
