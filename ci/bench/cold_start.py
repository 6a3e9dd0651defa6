"""Launch of the process to the first token of its first answer, over several starts: the medians.

    python ci/bench/cold_start.py [--model M] [--peers sixfold,llama.cpp] [--llama-server PATH]

The peers take turns. A first start of each, which packs weights and fills the page cache, counts
for nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
from pathlib import Path

from sixfold.server.peers.launchers import Peer, Wanted, choose
from sixfold.server.peers.processes import Server, stop


def start(peer: Peer, log: Path) -> tuple[float, float]:
    """Seconds to the first token, bytes resident then."""
    server = Server(peer, log)
    try:
        asyncio.run(server.first_token())
        return server.cold_start_s, server.resident_bytes()
    finally:
        stop([server])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="", help="empty: the demo model")
    parser.add_argument("--peers", default="sixfold")
    parser.add_argument("--llama-server", type=Path)
    parser.add_argument("--peer-arg", action="append", default=[], help="NAME=MORE ARGUMENTS")
    parser.add_argument("--starts", type=int, default=7)
    asked = parser.parse_args()
    programs = {"llama.cpp": asked.llama_server} if asked.llama_server else {}
    wanted = Wanted(
        asked.model,
        names=tuple(asked.peers.split(",")),
        arguments=tuple(asked.peer_arg),
        programs=programs,
    )
    peers, left_out = choose(wanted)
    if left_out:
        sys.exit(f"not measured: {left_out}")
    seconds: dict[str, list[float]] = {}
    memory: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(asked.starts + 1):
            found = {peer.name: start(peer, Path(folder) / "log") for peer in peers}
            if number:
                for name, (took, held) in found.items():
                    seconds.setdefault(name, []).append(took)
                    memory.setdefault(name, []).append(held)
    print("| | first token, median | from | to | resident then |")
    print("|---|---|---|---|---|")
    for name, took in seconds.items():
        held = statistics.median(memory[name]) / 1e9
        print(
            f"| {name} | {statistics.median(took):.2f} s | {min(took):.2f} s | {max(took):.2f} s "
            f"| {held:.2f} GB |"
        )


if __name__ == "__main__":
    main()
