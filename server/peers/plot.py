"""The comparison as one picture: a panel for each workload, a colour for each peer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .report import Comparison
from .summary import Row
from .workloads import PREFILL_SIZES

PANEL_INCHES = (3.2, 2.8)
COLUMNS = 4


def write_png(comparison: Comparison, path: Path) -> None:
    """Needs matplotlib. Bars are labelled; P is drawn as lines over the prompt's length."""
    from matplotlib.figure import Figure

    colours = {peer.name: f"C{index}" for index, peer in enumerate(comparison.peers)}
    panels = _panels(comparison)
    columns = min(COLUMNS, max(1, len(panels)))
    lines = -(-len(panels) // columns)
    width, height = PANEL_INCHES
    figure = Figure(figsize=(width * columns, height * lines + 0.8), layout="constrained")
    for index, (title, values) in enumerate(panels):
        axes = figure.add_subplot(lines, columns, index + 1)
        axes.set_title(title, fontsize=9)
        axes.tick_params(labelsize=8)
        if values is None:
            _prefill(axes, comparison.rows, colours)
        else:
            _bars(axes, values, colours)
    handles = [_swatch(name, colour) for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8)
    figure.suptitle(f"{comparison.settings['model']}: Sixfold and its peers", fontsize=11)
    figure.savefig(path, format="png", dpi=120)


def _panels(comparison: Comparison) -> list[tuple[str, dict[str, float] | None]]:
    """(title, value by peer); None in place of the values stands for P's lines."""
    panels: list[tuple[str, dict[str, float] | None]] = []
    for workload in dict.fromkeys(row.workload for row in comparison.rows if row.tokens_per_s):
        values = {
            row.peer: row.tokens_per_s
            for row in comparison.rows
            if row.workload == workload and row.tokens_per_s is not None
        }
        panels.append((f"{workload}: output tok/s", values))
    if any(row.workload.startswith("P") for row in comparison.rows):
        panels.append(("P: ms to first token", None))
    start = {s.peer: s.cold_start_s for s in comparison.starts if s.cold_start_s is not None}
    memory = {s.peer: s.resident_bytes / 1e9 for s in comparison.starts if s.resident_bytes}
    if start:
        panels.append(("S: s from launch to first token", start))
    if memory:
        panels.append(("S: GB of resident memory", memory))
    return panels


def _bars(axes: Any, values: dict[str, float], colours: dict[str, str]) -> None:
    bars = axes.bar(list(values), list(values.values()), color=[colours[name] for name in values])
    axes.bar_label(bars, fmt="%.3g", fontsize=8)
    axes.set_xticks([])
    axes.margins(y=0.15)


def _prefill(axes: Any, rows: Sequence[Row], colours: dict[str, str]) -> None:
    for name, colour in colours.items():
        points = [
            (int(row.workload.split()[1]), 1000 * row.ttft_p50_s)
            for row in rows
            if row.peer == name and row.workload.startswith("P") and row.ttft_p50_s is not None
        ]
        sizes, times = [size for size, _ in points], [time for _, time in points]
        axes.plot(sizes, times, "o-", color=colour, markersize=4)
    axes.set_xticks(PREFILL_SIZES)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("prompt tokens", fontsize=8)
    axes.grid(alpha=0.3)


def _swatch(name: str, colour: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=colour, label=name)
