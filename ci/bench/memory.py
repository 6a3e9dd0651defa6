"""Memory of the server beside what has to be there: the model's file, and keys and values in use.

    python ci/bench/memory.py --model M.gguf --kv-bytes N [--crowds 2]

N: bytes of one token's keys and values, 2 x layers x KV heads x head size x bytes of a number
(SmolLM2-135M in float16: 23040). Crowds are those of workload B in `sixfold bench peers`, eight at
once with prompts of their own, 64 tokens each. Pages that processes share count for each of them.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

from sixfold.server.peers.client import ask, connection
from sixfold.server.peers.launchers import Wanted, choose
from sixfold.server.peers.processes import Server, stop
from sixfold.server.peers.workloads import prompts

TOKENS = 64


async def crowd(server: Server, seed: int) -> int:
    """Tokens whose keys and values the answers needed. Raises SystemExit for a failed request."""
    peer = server.peer
    async with connection() as client:
        asked = [ask(client, peer.api, peer.model, p, TOKENS) for p in prompts("B", seed)]
        replies = await asyncio.gather(*asked)
    if errors := [reply.error for reply in replies if reply.error]:
        raise SystemExit(f"a request failed: {errors[0]}")
    return sum((reply.prompt_tokens or 0) + reply.output_tokens for reply in replies)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a GGUF file")
    parser.add_argument("--kv-bytes", type=int, required=True, help="of one token")
    parser.add_argument("--crowds", type=int, default=2)
    asked = parser.parse_args()
    peers, left_out = choose(Wanted(str(asked.model), names=("sixfold",)))
    if left_out:
        sys.exit(f"not measured: {left_out}")
    weights, cached = asked.model.stat().st_size, 0
    print(
        "| after | weights | keys and values | resident | ratio | more |\n|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        server = Server(peers[0], Path(folder) / "log")
        try:
            asyncio.run(server.first_token())
            for number in range(asked.crowds + 1):
                if number:
                    cached += asked.kv_bytes * asyncio.run(crowd(server, number))
                needed, held = weights + cached, server.resident_bytes()
                figures = (weights, cached, held)
                shown = " | ".join(f"{size / 1e9:.2f} GB" for size in figures)
                more = f"{held / needed:.2f} | {(held - needed) / 1e9:.2f} GB"
                print(f"| {number} crowds | {shown} | {more} |", flush=True)
        finally:
            stop([server])


if __name__ == "__main__":
    main()
