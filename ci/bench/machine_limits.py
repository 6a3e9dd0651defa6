"""What this machine can do at most, for the rooflines in docs/benchmarks.md: bytes read from
memory, float32 multiply-adds in registers, the inner loop of the AVX2 byte products in a cache.

    python ci/bench/machine_limits.py [--rounds 3]

Needs g++ and an x86-64 CPU with AVX2. One thread and all of them take turns; medians and ranges.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".cpp")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    if shutil.which("g++") is None:
        raise SystemExit("needs g++ (Debian: apt-get install g++)")
    counts = sorted({1, len(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "limits")
        flags = ["-O2", "-std=c++17", "-mavx2", "-mfma", "-pthread"]
        subprocess.run(["g++", *flags, str(SOURCE), "-o", str(program)], check=True)
        found: dict[int, list[dict[str, float]]] = {count: [] for count in counts}
        for _ in range(rounds):
            for count in counts:
                command = [str(program), str(count)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                found[count].append(json.loads(done.stdout))
    print("| threads | " + " | ".join(found[1][0]) + " |\n|---|---|---|---|")
    for count, results in found.items():
        columns = ([result[name] for result in results] for name in results[0])
        cells = (f"{statistics.median(c):.4g} ({min(c):.4g} to {max(c):.4g})" for c in columns)
        print(f"| {count} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
