"""`sixfold bench peers`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import click

from ...common.errors import ConfigError


@click.command()
@click.argument("model", default="")
@click.option(
    "--hf",
    type=click.Path(exists=True, file_okay=False),
    help="The model's directory, for peers that read no GGUF.",
)
@click.option("--peers", "names", help="Only these, comma-separated, in this order.")
@click.option(
    "--url", "urls", multiple=True, help="A running server as NAME=URL or NAME=URL,MODEL."
)
@click.option(
    "--peer-arg", "arguments", multiple=True, help="More arguments of a peer as NAME=ARGUMENTS."
)
@click.option(
    "--llama-server",
    type=click.Path(exists=True, dir_okay=False),
    help="Path of llama.cpp's server if it is not on PATH.",
)
@click.option("--dtype", help="Of all peers: float32, bfloat16 or float16.")
@click.option("--quantize", help="Matrices of Sixfold as int8, int4, or none.")
@click.option(
    "--rounds", type=click.IntRange(1), default=3, show_default=True, help="How many of each."
)
@click.option("--workloads", default="ABCDWPS", show_default=True, help="Which to run, by letter.")
@click.option(
    "--out", default="bench-peers", show_default=True, help="Prefix of the files to write."
)
def peers(model: str, **flags: Any) -> None:
    """Measure Sixfold and other engines side by side, and write a table, a JSON file and a plot.

    MODEL is a directory, a .gguf file or a hub id; the bundled demo model if not given. Engines
    that are not installed, or that cannot read the model, are named and left out.

    \b
    A  one stream, 512 prompt tokens to 128      B, C  8, 32 at a time
    D  16 requests with a common beginning       W     the same again, warm
    P  prefill of 512 to 4,096 tokens            S     cold start and memory
    """
    from ..peers.compare import Plan, compare
    from ..peers.launchers import Wanted
    from ..peers.report import markdown, write_json
    from ..peers.workloads import parse

    workloads, out = parse(flags["workloads"]), flags["out"]
    if not Path(out).absolute().parent.is_dir():
        raise ConfigError(f"--out: there is no folder {Path(out).parent}.")
    wanted = Wanted(
        model=model,
        hf=Path(flags["hf"]) if flags["hf"] else None,
        names=tuple(filter(None, (name.strip() for name in (flags["names"] or "").split(",")))),
        urls=flags["urls"],
        arguments=flags["arguments"],
        programs={"llama.cpp": Path(flags["llama_server"])} if flags["llama_server"] else {},
        dtype=flags["dtype"],
        quantize=flags["quantize"],
        prefill="P" in workloads,
    )
    comparison = compare(Plan(wanted, workloads, flags["rounds"], out), _tell)
    table = markdown(comparison)
    Path(f"{out}.md").write_text(table, "utf-8")
    write_json(comparison, Path(f"{out}.json"))
    written = [f"{out}.md", f"{out}.json"]
    if importlib.util.find_spec("matplotlib") is not None:
        from ..peers.plot import write_png

        write_png(comparison, Path(f"{out}.png"))
        written.append(f"{out}.png")
    else:
        _tell("no plot: it needs matplotlib (pip install matplotlib)")
    click.echo(f"\n{table}\nwritten: {', '.join(written)}")
    if comparison.errors or comparison.ended:
        raise SystemExit(1)


def _tell(line: str) -> None:
    click.echo(line, err=True)
