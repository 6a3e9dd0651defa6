"""Compiles every Triton kernel for GPUs that are not there and keeps what the binaries need.

    python ci/compile_table.py [--target NAME ...] --check    compare with the baseline
    python ci/compile_table.py --write                        renew it, and docs/kernel-resources.md

`--check` fails when a kernel spills vectors, when registers or shared memory have grown, when fewer
programs fit a core, when another matrix instruction is used, or when a compile takes too long: a
slow compile is how a register allocator shows that it finds no room. Needs the Triton of
ci/constraints.txt, for its numbers change with the version; no GPU, no driver.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import triton
from compile_targets import TARGETS, Resources, compile_work
from compile_workload import work

ROOT = Path(__file__).resolve().parent.parent
BASELINE = ROOT / "ci" / "kernel_resources.json"
PAGE = ROOT / "docs" / "kernel-resources.md"

SLACK = 8
"""Registers: the granule in which every target allots them, so that less changes nothing."""
LONGEST = 20.0
"""Seconds of processor time for one kernel; the slowest in the baseline takes a quarter of it."""

HEAD = """# What the Triton kernels need

Compiled, not run: `python ci/compile_table.py --write` made this page with Triton {version}, on a machine without a GPU. Each kernel is specialised as its
wrapper launches it for models of real size (bfloat16 unless said otherwise), cut as `platforms/triton_kernels/tuning.toml` says for the target.

Registers are per lane. *Occupancy* is in warps: per SIMD on AMD, by the compiler's own report (which leaves out shared memory); per core on NVIDIA, as registers and
shared memory allow. No kernel spills vectors. *Scalar spills* (AMD) are masks and addresses kept in lanes of a vector register: they cost an instruction, no memory.
`--check` in CI compares with `ci/kernel_resources.json`.
"""  # noqa: E501
COLUMNS = (
    "kernel",
    "registers",
    "scalar spills",
    "shared bytes",
    "occupancy",
    "matrix instructions",
)

Table = dict[str, dict[str, dict[str, Any]]]
"""Target -> kernel -> the fields of Resources but for its name and its time."""


def compile_target(name: str) -> list[Resources]:
    """Of kernels that several pieces of work launch alike, one."""
    found: dict[str, Resources] = {}
    for resources in compile_work(TARGETS[name], work(TARGETS[name])):
        label, count = resources.kernel, 1
        while resources.kernel in found:
            count += 1
            resources = Resources(**{**asdict(resources), "kernel": f"{label} {count}"})
        found[resources.kernel] = resources
    return list(found.values())


def complaints(found: Iterable[Resources], before: dict[str, dict[str, Any]]) -> list[str]:
    """What is worse than the baseline of the same target, or must never be."""
    said, seen = [], set()
    for kernel in found:
        seen.add(kernel.kernel)
        say = said.append
        if kernel.spills:
            say(f"{kernel.kernel}: spills {kernel.spills} to memory")
        if kernel.seconds > LONGEST:
            say(f"{kernel.kernel}: compiled for {kernel.seconds} s, more than {LONGEST}")
        old = before.get(kernel.kernel)
        if old is None:
            say(f"{kernel.kernel}: not in the baseline; renew it with --write")
            continue
        for field, slack in (("registers", SLACK), ("scalar_spills", SLACK), ("shared", 0)):
            now = getattr(kernel, field)
            if now > old[field] + slack:
                say(f"{kernel.kernel}: {field} {now}, were {old[field]}")
        if kernel.occupancy < old["occupancy"]:
            say(f"{kernel.kernel}: occupancy {kernel.occupancy}, was {old['occupancy']}")
        if kernel.matrix != old["matrix"]:
            say(f"{kernel.kernel}: multiplies by {kernel.matrix!r}, did by {old['matrix']!r}")
    said += [f"{name}: in the baseline, not compiled" for name in before if name not in seen]
    return said


def plain(found: Iterable[Resources]) -> dict[str, dict[str, Any]]:
    rows = {}
    for kernel in found:
        fields = asdict(kernel)
        fields.pop("seconds")
        rows[fields.pop("kernel")] = fields
    return rows


def page(table: Table) -> str:
    parts = [HEAD.format(version=triton.__version__)]
    for target, rows in table.items():
        parts += [f"\n## {target}\n", _row(COLUMNS), _row(["---"] * len(COLUMNS))]
        for name, row in rows.items():
            cells = [name, row["registers"], row["scalar_spills"], row["shared"], row["occupancy"]]
            parts.append(_row([*cells, row["matrix"].replace(" ", ", ")]))
    return "\n".join(parts) + "\n"


def _row(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", action="append", choices=TARGETS, help="default: all")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--check", action="store_true", help="compare with the baseline")
    mode.add_argument("--write", action="store_true", help="renew the baseline and the page")
    asked = parser.parse_args(arguments)
    recorded = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    if asked.check and recorded.get("triton") != triton.__version__:
        print(f"The baseline is of Triton {recorded.get('triton')}, this is {triton.__version__}.")
        return 1
    table: Table = recorded.get("targets", {})
    worse = []
    for name in asked.target or TARGETS:
        began = time.process_time()
        found = compile_target(name)
        print(f"{name}: {len(found)} kernels in {time.process_time() - began:.0f} s")
        said = complaints(found, table.get(name, {}) if asked.check else plain(found))
        worse += [f"{name}: {text}" for text in said]
        table[name] = plain(found) if asked.write else table.get(name, {})
    print("\n".join(worse) or "no kernel is worse than it was")
    if asked.write and not worse:
        content = {"triton": triton.__version__, "targets": table}
        BASELINE.write_text(json.dumps(content, indent=1) + "\n")
        PAGE.write_text(page(table))
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
