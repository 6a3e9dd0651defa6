"""The parts of `sixfold verify`: kernels against their contracts, a model's answers, its speed.

Kernels and the server run in processes of their own: one that breaks the device leaves the report.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import psutil

from ..common.errors import SixfoldError
from ..common.evidence import Result
from ..platforms import machine as machines
from ..platforms import select
from ..platforms.interface import DeviceFacts, Platform
from ..platforms.interface_collectives import JoinsDevices
from .load import Load, LoadGenerator
from .peers.launchers import Peer
from .peers.processes import PeerFailed, Server, stop

PARTS = {
    "kernels": "every kernel and attention backend against its contract",
    "answers": "a model served over HTTP, its log-probabilities and its answers",
    "speed": "the same server, one stream and eight at a time",
    "collectives": "the devices joined, where there are several: sums, gathers and broadcasts",
}
START_LIMIT_S = 1800.0
KERNELS_LIMIT_S = 3600.0

PASSAGE = (
    "The quick brown fox jumps over the lazy dog. Water boils at one hundred degrees, and ice melts"
    " at zero. Paris is the capital of France, Rome of Italy, and Tokyo of Japan."
)
PROMPT, WORD = "The capital of France is", "Paris"
DEMO_MEAN = -3.3467
"""Mean log-probability of PASSAGE's tokens by the demo model in float32, which a test repeats."""
ALLOWED = 0.1
"""From DEMO_MEAN; four-bit weights with eight-bit activations are 0.013 away."""


class WrongAnswer(SixfoldError):
    """What the server said cannot be right; `seen` is what it said."""

    def __init__(self, sentence: str, seen: Mapping[str, Any]) -> None:
        super().__init__(sentence)
        self.seen = seen


@dataclass(frozen=True, slots=True)
class Wanted:
    platform: str
    model: str = ""  # "": the bundled demo model, of which the right answers are known
    dtype: str | None = None


def run(wanted: Wanted, parts: Sequence[str]) -> Iterator[tuple[str, Result]]:
    """The parts in their order, each as it ends."""
    if "kernels" in parts:
        yield "kernels", kernels(wanted.platform)
    yield from _served(wanted, {name: SERVED[name] for name in SERVED if name in parts})
    if "collectives" in parts:
        found = select.probe_all(machines.observe())[wanted.platform]
        yield "collectives", collectives(select.platforms()[wanted.platform], found.devices)


def _served(wanted: Wanted, asked: Mapping[str, Part]) -> Iterator[tuple[str, Result]]:
    if not asked:
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            server = start(wanted, Path(folder) / "server.log")
        except PeerFailed as error:
            for name in asked:
                yield name, Result("device", "failed", f"the server did not start: {error}")
            return
        try:
            for name, part in asked.items():
                yield name, _judged(part, wanted, server)
        finally:
            stop([server])


def kernels(platform: str) -> Result:
    """`sixfold check` in a process of its own."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "sixfold", "check", "--platform", platform, "--json"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=KERNELS_LIMIT_S
        )
    except subprocess.TimeoutExpired:
        return Result("device", "failed", f"took longer than {KERNELS_LIMIT_S:.0f} s")
    result = of_check(done.stdout, done.stderr, done.returncode)
    return replace(result, seconds=round(time.perf_counter() - began, 1))


def of_check(stdout: str, stderr: str, status: int) -> Result:
    """What `sixfold check --json` found. A process that ended otherwise has failed, and the last
    lines of its standard error name the op that was running."""
    last = " / ".join(stderr.strip().splitlines()[-3:])
    try:
        found = json.loads(stdout)
    except ValueError:
        return Result("device", "failed", f"ended with status {status}: {last}"[:1000])
    table = found["kernels"]
    named = [f"{k['op']} {k['provider']}" for k in table if k["status"] == "fail"]
    count = {
        name: sum(k["status"] == name for k in table) for name in ("unverified", "unsupported")
    }
    figures = {"cases": found["executed"], "kernels": len(table), **count}
    evidence = found["evidence"].partition(":")[0]
    kept = ("op", "provider", "status", "passed", "failed", "errors", "failures")
    details = {"kernels": [{name: k[name] for name in kept} for k in table]}
    reason = f"failed: {', '.join(named)}" if named else "" if found["executed"] else last
    return Result(evidence, "failed" if reason else "passed", reason, 0.0, figures, details)


def collectives(platform: Platform, devices: Sequence[DeviceFacts]) -> Result:
    """Every device in a process of its own, which the platform starts and watches."""
    if len(devices) < 2:
        return Result("device", "skipped", "one device: nothing to join")
    if not isinstance(platform, JoinsDevices):
        reason = f"the platform {platform.name} joins no devices; it has {len(devices)}"
        return Result("device", "skipped", reason)
    began = time.perf_counter()
    try:
        found = platform.check_collectives(devices)
    except SixfoldError as error:
        return Result("device", "failed", str(error))
    figures = {"backend": found.backend, "devices": found.devices, "cases": found.cases}
    reason = "; ".join(found.failures)[:3000] or ("" if found.cases else "no case ran")
    state, took = "failed" if reason else "passed", round(time.perf_counter() - began, 1)
    return Result("device", state, reason, took, figures, {"failures": found.failures})


def start(wanted: Wanted, log: Path) -> Server:
    """A server that answers; the time that took is its `cold_start_s`. Raises PeerFailed."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "sixfold", "serve", "--platform", wanted.platform]
    command += ["--port", "{port}", "--max-rows", "8"]
    command += ["--dtype", wanted.dtype] if wanted.dtype else []
    command += [wanted.model] if wanted.model else []
    server = Server(Peer("sixfold", "http://127.0.0.1:{port}", "", tuple(command)), log)
    try:
        _wait(server)
    except BaseException:
        stop([server])
        raise
    server.cold_start_s = time.perf_counter() - began
    return server


def _wait(server: Server) -> None:
    ends = time.monotonic() + START_LIMIT_S
    while time.monotonic() < ends:
        if not server.alive:
            raise PeerFailed(server.failure("it ended"))
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{server.peer.api}/ready", timeout=30).status_code == 200:
                return
        time.sleep(0.2)
    raise PeerFailed(server.failure(f"not ready within {START_LIMIT_S:.0f} s"))


Part = Callable[[Wanted, str], Result]


def _judged(part: Part, wanted: Wanted, server: Server) -> Result:
    """An error of any kind is the part's result, with the end of the server's log."""
    began = time.perf_counter()
    try:
        result = part(wanted, server.peer.api)
    except Exception as error:
        reason = (
            str(error) if isinstance(error, SixfoldError) else f"{type(error).__name__}: {error}"
        )
        if not server.alive:
            reason = server.failure(f"the server ended ({reason})")
        seen = error.seen if isinstance(error, WrongAnswer) else {}
        result = Result("device", "failed", reason[:3000], figures=seen)
    figures = {**result.figures, "seconds to start": round(server.cold_start_s, 1)}
    return replace(result, seconds=round(time.perf_counter() - began, 1), figures=figures)


def answers(wanted: Wanted, api: str) -> Result:
    """Raises WrongAnswer where what is said cannot be right."""
    with httpx.Client(base_url=api, timeout=600) as client:
        served = _json(client.get("/v1/platform"))
        model = served["model"]
        mean = _mean(client, model)
        texts = [_complete(client, model), _complete(client, model)]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda _: _complete(client, model), range(8)))
    figures = {
        "mean log-probability": round(mean, 4),
        "answer": texts[0],
        "asked again": "equal" if texts[1] == texts[0] else texts[1],
        "of 8 at a time equal": together.count(texts[0]),
        "dtype": _chosen(served, "dtype"),
        "step": _chosen(served, "step"),
        "attention": _chosen(served, "kernel attention"),
    }
    _doubt(wanted, served, mean, texts[0], figures)
    return Result("device", "passed", figures=figures, details={"platform": served})


def _doubt(
    wanted: Wanted, served: Mapping[str, Any], mean: float, text: str, seen: Mapping[str, Any]
) -> None:
    """Whether a model can have said so. Of any model only that it is better than chance."""
    if served["platform"] != wanted.platform:
        raise WrongAnswer(f"{served['platform']} served, not {wanted.platform}", seen)
    chance = -math.log(served["vocab_size"])
    if not chance < mean <= 0:
        raise WrongAnswer(
            f"the mean log-probability of a plain English passage is {mean:.4g}; "
            f"chance is {chance:.4g}", seen
        )  # fmt: skip
    if wanted.model:
        return
    if abs(mean - DEMO_MEAN) > ALLOWED:
        raise WrongAnswer(
            f"the mean log-probability of the passage is {mean:.4f}, not {DEMO_MEAN} ± {ALLOWED}",
            seen,
        )
    if WORD not in text:
        raise WrongAnswer(f"the demo model completes {PROMPT!r} with {text!r}", seen)


def _mean(client: httpx.Client, model: str) -> float:
    """Of the passage's log-probabilities; NaN where one is not a number."""
    body = {"model": model, "prompt": PASSAGE, "max_tokens": 1, "temperature": 0}
    answer = _json(client.post("/v1/completions", json={**body, "echo": True, "logprobs": 1}))
    usage, values = answer["usage"], answer["choices"][0]["logprobs"]["token_logprobs"]
    of_prompt = [v for v in values[: usage["prompt_tokens"]] if v is not None]
    return math.fsum(of_prompt) / len(of_prompt) if of_prompt else math.nan


def _complete(client: httpx.Client, model: str) -> str:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    return str(_json(client.post("/v1/completions", json=body))["choices"][0]["text"])


def _json(answer: httpx.Response) -> dict[str, Any]:
    if answer.status_code != 200:
        raise SixfoldError(f"HTTP {answer.status_code}: {answer.text[:500]}")
    found: dict[str, Any] = answer.json()
    return found


def _chosen(served: Mapping[str, Any], what: str) -> str:
    found = [d["chosen"] for d in served["decisions"] if d["what"] == what]
    return str(found[0]) if found else ""


def speed(wanted: Wanted, api: str) -> Result:
    """Raises SixfoldError when a request fails."""
    # What else the machine does: figures of a busy one say little.
    figures: dict[str, Any] = {"load average": round(psutil.getloadavg()[0], 1)}
    for streams, requests in ((1, 2), (8, 8)):
        load = Load(
            api, "", requests=requests, concurrency=streams, prompt_tokens=128, output_tokens=32
        )
        report = asyncio.run(LoadGenerator(load).run())
        if report["errors"]:
            raise SixfoldError(f"{report['errors']} requests failed: {report['first_error']}")
        figures[f"{streams} streams"] = {
            "output tokens/s": round(report["output_tokens_per_second"], 1),
            "first token ms": round(report["ttft_ms"]["p50"], 1),
            "between tokens ms": round(report["tpot_ms"]["p50"], 2),
        }
    return Result("device", "passed", figures=figures)


SERVED: Mapping[str, Part] = {"answers": answers, "speed": speed}
