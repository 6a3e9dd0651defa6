"""`sixfold bench`: the load generator itself, and the group that its subcommands are in."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import click

from ...common.errors import ConfigError
from .bench_peers import peers


@click.group(invoke_without_command=True)
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="The server.")
@click.option("--model", default="", help="Model name; the first one served if not given.")
@click.option("--api-key", help="Key of the server.")
@click.option(
    "--endpoint",
    type=click.Choice(["completions", "chat"]),
    default="completions",
    help="Which API to measure.",
)
@click.option("--requests", type=click.IntRange(1), default=64, help="How many requests to send.")
@click.option("--concurrency", type=click.IntRange(1), default=8, help="How many at a time.")
@click.option("--rate", type=float, help="Requests a second at random times, instead.")
@click.option("--prompt-tokens", type=click.IntRange(1), default=512, help="Length of a prompt.")
@click.option("--output-tokens", type=click.IntRange(1), default=128, help="Length of an answer.")
@click.option("--shared-prefix", type=click.IntRange(0), default=0, help="Tokens equal in all.")
@click.option("--seed", type=int, help="Repeat a run's prompts; random if not given.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False), help="Write figures here.")
@click.option("--plot", type=click.Path(dir_okay=False), help="Write a PNG plot here.")
@click.pass_context
def bench(
    context: click.Context, /, json_file: str | None, plot: str | None, **settings: Any
) -> None:
    """Send synthetic prompts to a server and report latency and throughput.

    With a command: that instead.
    """
    if context.invoked_subcommand is not None:
        _refuse_options(context)
        return
    if plot is not None:
        _need_matplotlib()
    if settings["rate"] is not None and settings["rate"] <= 0:
        raise ConfigError(f"--rate must be above 0, got {settings['rate']}.")
    from ..load import Load, LoadGenerator

    if settings["seed"] is None:
        settings["seed"] = random.SystemRandom().randrange(2**32)
    report = asyncio.run(LoadGenerator(Load(**settings)).run())
    if json_file is not None:
        Path(json_file).write_text(json.dumps(report, indent=1))
    if plot is not None:
        _plot(report, plot)
    click.echo(_table(report))
    if report["errors"]:
        raise SystemExit(1)


bench.add_command(peers)


def _refuse_options(context: click.Context) -> None:
    """What stands before a subcommand would be ignored, and a flag is never ignored."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(
                f"{parameter.opts[0]} before `{context.invoked_subcommand}` has no meaning; "
                "options of a command stand after it.",
                context,
            )


def _table(report: dict[str, Any]) -> str:
    lines = [
        f"{report['completed']} requests in {report['seconds']:.1f} s, {report['errors']} errors"
        + (f" (first: {report['first_error']})" if report["errors"] else ""),
        f"tokens: {report['prompt_tokens']} prompt ({report['cached_tokens']} cached), "
        f"{report['output_tokens']} output",
        f"throughput: {report['output_tokens_per_second']:.1f} output tok/s, "
        f"{report['total_tokens_per_second']:.1f} total tok/s, "
        f"{report['requests_per_second']:.2f} requests/s",
        f"{'ms':6}{'mean':>10}{'p50':>10}{'p90':>10}{'p99':>10}",
    ]
    for name in ("ttft", "tpot", "itl", "e2e"):
        spread = report[f"{name}_ms"]
        lines.append(f"{name.upper():6}" + "".join(f"{v:10.1f}" for v in spread.values()))
    return "\n".join(lines)


def _need_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install matplotlib") from None


def _plot(report: dict[str, Any], path: str) -> None:
    """The distribution of the two latencies that users feel, as cumulative curves."""
    from matplotlib.figure import Figure

    good = [sample for sample in report["samples"] if sample["error"] is None]
    first = sorted(1000 * sample["arrivals"][0] for sample in good)
    gaps = sorted(
        1000 * (b - a)
        for sample in good
        for a, b in zip(sample["arrivals"], sample["arrivals"][1:], strict=False)
    )
    figure = Figure(figsize=(9, 4), layout="constrained")
    named = (("time to first token", first), ("between tokens", gaps))
    for axes, (name, values) in zip(figure.subplots(1, 2), named, strict=True):
        axes.step(values, [(i + 1) / len(values) for i in range(len(values))], where="post")
        axes.set(xlabel=f"{name}, ms", ylabel="share of them", ylim=(0, 1))
        axes.grid(alpha=0.3)
    settings = report["settings"]
    figure.suptitle(
        f"{settings['model']}: {report['output_tokens_per_second']:.0f} output tok/s, "
        f"{settings['prompt_tokens']} in, {settings['output_tokens']} out"
    )
    figure.savefig(path, format="png", dpi=120)
