"""Sixfold against its peers: same model and weights, same run, rounds interleaved, texts compared.

    python ci/bench/demo_model.py /tmp/demo
    python ci/bench/peers.py --models /tmp/demo --llama-server PATH --out bench.json

`--weights q8_0` and `q4_1` give Sixfold and llama.cpp the same quantised file; transformers has
float32 only.

A peer whose program is not there is left out and named. Needs two free gigabytes per peer.
"""

from __future__ import annotations

import argparse
import asyncio
import difflib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
from workloads import Outcome, run


@dataclass(frozen=True, slots=True)
class Peer:
    name: str
    command: tuple[str, ...]
    port: int
    model: str  # the name to ask for

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def peers(asked: argparse.Namespace) -> list[Peer]:
    threads = str(os.cpu_count())
    gguf, hf = str(asked.models / f"demo-{asked.weights}.gguf"), str(asked.models / "hf")
    here = Path(sys.executable).parent
    fp32 = ("--dtype", "float32")
    exact = asked.weights == "f32"
    ours = (str(here / "sixfold"), "serve", gguf, "--served-model-name", "demo")
    if exact:
        ours = (*ours, *fp32)
    theirs = (str(here / "transformers"), "serve", hf, "--device", "cpu", *fp32)
    llama = (str(asked.llama_server or "llama-server"), "-m", gguf, "--jinja", "-t", threads)
    cache: tuple[str, ...] = ("-np", "32", "-c", "65536")
    if exact:
        cache = (*cache, "--cache-type-k", "f32", "--cache-type-v", "f32")
    known = [
        Peer("sixfold", ours, 8101, "demo"),
        Peer("sixfold-no-tree", (*ours, "--no-prefix-cache"), 8105, "demo"),
        Peer("transformers", theirs, 8102, hf),
        Peer("transformers-cb", (*theirs, "--continuous-batching"), 8103, hf),
        Peer("llama.cpp", (*llama, "-tb", threads, *cache), 8104, "demo"),
    ]
    chosen = [p for p in known if not asked.peers or p.name in asked.peers.split(",")]
    for peer in chosen:
        if shutil.which(peer.command[0]) is None:
            print(f"left out: {peer.name} ({peer.command[0]} is not installed)", flush=True)
    return [p for p in chosen if shutil.which(p.command[0])]


def wait_ready(peer: Peer, process: subprocess.Popen[bytes], limit_s: float = 300) -> None:
    """Ready means: one short completion came back."""
    deadline = time.monotonic() + limit_s
    body = {"model": peer.model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if (
                httpx.post(f"{peer.base}/v1/chat/completions", json=body, timeout=120).status_code
                == 200
            ):
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    sys.exit(f"{peer.name} did not become ready; see its log")


def likeness(a: tuple[str, ...], b: tuple[str, ...]) -> float:
    """Mean similarity of texts, 1 = all equal."""
    return statistics.mean(
        difflib.SequenceMatcher(None, x, y).ratio() for x, y in zip(a, b, strict=True)
    )


def measure(chosen: list[Peer], rounds: int, workloads: str) -> dict[str, dict[str, list[Outcome]]]:
    results: dict[str, dict[str, list[Outcome]]] = {
        p.name: {w: [] for w in workloads} for p in chosen
    }
    for number in range(rounds):
        for workload in workloads:
            order = chosen if number % 2 == 0 else chosen[::-1]
            for peer in order:
                outcome = asyncio.run(run(peer.base, peer.model, workload, seed=number))
                results[peer.name][workload].append(outcome)
                rate, ttft = f"{outcome.tokens_per_s:7.1f} tok/s", f"ttft {outcome.ttft_s:6.2f} s"
                cached = f"cached {outcome.cached_tokens}"
                print(
                    f"round {number} {workload} {peer.name:16s} {rate}  {ttft}  {cached}",
                    flush=True,
                )
    return results


def summary(
    results: dict[str, dict[str, list[Outcome]]], workloads: str
) -> list[dict[str, object]]:
    """Medians, and the likeness of the texts to the first peer's in the same round."""
    first = next(iter(results))
    rows: list[dict[str, object]] = []
    for name, by_workload in results.items():
        for w in workloads:
            runs = by_workload[w]
            same = [
                likeness(a.texts, b.texts) for a, b in zip(runs, results[first][w], strict=True)
            ]
            rows.append({
                "peer": name, "workload": w,
                "tokens_per_s": round(statistics.median(r.tokens_per_s for r in runs), 1),
                "ttft_s": round(statistics.median(r.ttft_s for r in runs), 3),
                "text_likeness": round(statistics.median(same), 3),
                "rounds": [round(r.tokens_per_s, 1) for r in runs],
            })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", type=Path, required=True, help="folder made by demo_model.py")
    parser.add_argument("--llama-server", type=Path, help="llama.cpp's server binary")
    parser.add_argument("--weights", choices=("f32", "q8_0", "q4_1"), default="f32")
    parser.add_argument("--peers", default="", help="comma-separated names; empty = all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workloads", default="ABCDW")
    parser.add_argument("--out", type=Path, default=Path("bench-peers.json"))
    asked = parser.parse_args()
    chosen = peers(asked)
    processes = []
    try:
        for peer in chosen:
            log = asked.out.with_suffix(f".{peer.name}.log").open("wb")
            processes.append(
                subprocess.Popen(
                    [*peer.command, "--port", str(peer.port)], stdout=log, stderr=subprocess.STDOUT
                )
            )
            wait_ready(peer, processes[-1])
            print("ready:", peer.name, flush=True)
        results = measure(chosen, asked.rounds, asked.workloads)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(60)
    rows = summary(results, asked.workloads)
    raw = {p: {w: [asdict(o) for o in runs] for w, runs in d.items()} for p, d in results.items()}
    asked.out.write_text(json.dumps({"summary": rows, "runs": raw}, indent=1))
    print(f"\n{'peer':24s}" + "".join(f"{w:>18s}" for w in asked.workloads))
    for name in results:
        cells = [r for r in rows if r["peer"] == name]
        print(
            f"{name:24s}"
            + "".join(f"{c['tokens_per_s']:>10} {c['text_likeness']:>7}" for c in cells)
        )


if __name__ == "__main__":
    main()
