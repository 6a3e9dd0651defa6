"""`sixfold check`: every kernel of a platform against its contract, as one table."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ... import __version__
from ...common.errors import ConfigError, PlatformError
from ...common.ops import OPS
from ...common.ops.conformance import Verdict, run_suite
from ...platforms import machine as machines
from ...platforms import select
from ...platforms.interface import DeviceFacts
from ...platforms.interface_kernels import Op, Suite


@dataclass(frozen=True, slots=True)
class Report:
    platform: str
    suite: Suite
    verdicts: Sequence[Verdict]

    @property
    def executed(self) -> int:
        return sum(verdict.executed for verdict in self.verdicts)

    @property
    def failed(self) -> list[Verdict]:
        return [verdict for verdict in self.verdicts if verdict.status == "fail"]


@click.command()
@click.option("--platform", help="Hardware to check; the best usable one if not given.")
@click.option(
    "--op",
    "wanted",
    multiple=True,
    help="Only this op (or several), with or without the scheme of its weights.",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
@click.option("--interpret", is_flag=True, help="Run Triton kernels in Triton's interpreter.")
def check(platform: str | None, wanted: tuple[str, ...], as_json: bool, interpret: bool) -> None:
    """Run every kernel of a platform against its contract."""
    ops = chosen_ops(wanted)
    name, facts = chosen_platform(platform, interpret)
    suite = select.platforms()[name].conformance(facts, interpret)
    report = Report(name, suite, run_aloud(suite, ops))
    if as_json:
        click.echo(json.dumps(record(report), indent=2))
    else:
        show(report, console())
    if not report.executed:
        raise PlatformError(nothing_ran(report, wanted))
    sys.exit(1 if report.failed else 0)


def console() -> Console:
    """Of a file or a pipe it is not known how wide it may be."""
    plain = Console(highlight=False, markup=False)
    if not plain.is_terminal:
        plain.width = max(plain.width, WIDE)
    return plain


def run_aloud(suite: Suite, ops: Mapping[str, Op]) -> list[Verdict]:
    """Says on standard error which op is next: a kernel may end the process, and the last op named
    is then the one that did."""
    console = Console(stderr=True, highlight=False)
    with console.status("") as status:
        tell = status.update if console.is_terminal else console.print
        return run_suite(suite, ops, lambda title: tell(f"running {title}"))


def chosen_ops(names: Sequence[str]) -> Mapping[str, Op]:
    """All where none is named. Raises ConfigError where a name is no op's."""
    if not names:
        return OPS
    known = {name for title, op in OPS.items() for name in (title, op.name)}
    for name in names:
        if name not in known:
            raise ConfigError(f"There is no op {name!r}; there are {', '.join(OPS)}.")
    return {title: op for title, op in OPS.items() if title in names or op.name in names}


def chosen_platform(name: str | None, interpret: bool) -> tuple[str, DeviceFacts | None]:
    """Its name and, unless kernels are interpreted, the device to run on. Raises PlatformError."""
    if interpret and name is not None:
        if name not in select.platforms():
            listed = ", ".join(select.platforms())
            raise PlatformError(f"There is no platform {name!r}; there are {listed}.")
        return name, None
    found = select.probe_all(machines.observe())
    chosen = select.choose(found, name).chosen
    return chosen, found[chosen].devices[0]


def nothing_ran(report: Report, ops: Sequence[str]) -> str:
    what = f"of op {', '.join(map(repr, ops))}" if ops else "at all"
    if not report.verdicts:
        return f"No case ran {what}: {report.platform} registers no kernel for it."
    reasons = {reason: None for v in report.verdicts for reason in (*v.unverified, *v.refused)}
    return f"No case ran {what} on {report.platform}: {'; '.join(reasons)}."


def record(report: Report) -> dict[str, Any]:
    """The report as plain JSON values."""
    kernels = [
        {"status": verdict.status, "executed": verdict.executed, **asdict(verdict)}
        for verdict in report.verdicts
    ]
    return {
        "version": __version__,
        "platform": report.platform,
        "device": report.suite.device,
        "evidence": report.suite.evidence,
        "executed": report.executed,
        "failed": len(report.failed),
        "kernels": kernels,
    }


STYLES = {"pass": "green", "fail": "bold red", "unverified": "yellow", "unsupported": "dim"}


LEGEND = (
    "cases, largest error; FAIL: cases that failed; no: unsupported; ?: unverified; "
    "-: it has no kernel for this op"
)
WIDE = 140


def show(report: Report, console: Console) -> None:
    console.print(f"{report.platform}: {report.suite.device} ({report.suite.evidence})")
    console.print()
    console.print(_matrix(report.verdicts))
    console.print(Text(f"\n{LEGEND}", "dim"))
    for status in ("fail", "unverified", "unsupported", "pass"):
        _details(status, [v for v in report.verdicts if v.status == status], console)
    console.print()
    console.print(_summary(report))


def _matrix(verdicts: Sequence[Verdict]) -> Table:
    """Ops down, kernels across; a cell has the cases that ran and the largest error of the widest
    dtype that ran."""
    providers = list(dict.fromkeys(verdict.provider for verdict in verdicts))
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("op", *providers):
        table.add_column(heading, no_wrap=True)
    for op in dict.fromkeys(verdict.op for verdict in verdicts):
        row = {verdict.provider: _cell(verdict) for verdict in verdicts if verdict.op == op}
        table.add_row(op, *(row.get(provider, Text("-", "dim")) for provider in providers))
    return table


def _cell(verdict: Verdict) -> Text:
    text = {"unsupported": "no", "unverified": "?"}.get(verdict.status, "")
    if verdict.status == "pass":
        largest = next(iter(verdict.errors.values()))
        text = f"{verdict.passed} {largest:.0e}" if largest else f"{verdict.passed} exact"
    if verdict.status == "fail":
        text = f"FAIL {verdict.failed}"
    return Text(text, STYLES[verdict.status])


def _details(status: str, verdicts: Sequence[Verdict], console: Console) -> None:
    """What failed, why a cell is not a pass, and what a pass leaves out."""
    for verdict in verdicts:
        for failure in verdict.failures:
            title = f"\nFAIL {verdict.op} {verdict.provider}"
            console.print(Text(f"{title}, case {failure.case!r} in {failure.dtype}", "red"))
            console.print(Text(f"  largest error {failure.error:.3g}; {failure.message}"))
    lines = _reasons(verdicts)
    if lines:
        left_out = {"pass": "cases left out", "fail": "cases left out of what failed"}
        console.print(Text(f"\n{left_out.get(status, status)}", "bold"))
    for (provider, reason), ops in lines.items():
        console.print(Text(f"  {provider}: {reason}: {', '.join(ops.values())}"))


def _reasons(verdicts: Sequence[Verdict]) -> dict[tuple[str, str], dict[str, str]]:
    """(provider, reason) -> op -> the op and how many of its cases that left out, where others ran.
    Several reasons of one refusal stand apart."""
    counts: dict[tuple[str, str], dict[str, int]] = {}
    ran = {(v.provider, v.op) for v in verdicts if v.executed}
    for v in verdicts:
        for joined, count in (v.unverified | v.refused).items():
            for reason in joined.split("; "):
                ops = counts.setdefault((v.provider, reason), {})
                ops[v.op] = ops.get(v.op, 0) + count
    return {
        (provider, reason): {
            op: f"{op} ({count})" if (provider, op) in ran else op for op, count in ops.items()
        }
        for (provider, reason), ops in counts.items()
    }


def _summary(report: Report) -> Text:
    count = f"{report.executed} cases ran on {len(report.verdicts)} kernels"
    if report.failed:
        names = ", ".join(f"{v.op} {v.provider}" for v in report.failed)
        return Text(f"{count}; FAILED: {names}", "bold red")
    return Text(f"{count}; none failed", "bold green" if report.executed else "bold yellow")
