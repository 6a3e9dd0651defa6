"""Contract guarded: `sixfold bench peers` measures real servers and writes what it found. Running
and launched peers, missing and failing ones, errors, the files; servers that wait are suspended,
and none is left behind, also after Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from serving import DEADLINE, Launcher, Running, until
from toy_checkpoint import write_toy_checkpoint

SIXFOLD = [sys.executable, "-m", "sixfold", "bench", "peers"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Toys (a byte is a token) whose context holds A and the first two prompts of P."""
    folder = tmp_path_factory.mktemp("peers")
    scripts = {"babbler": "", "parrot": "It always says the same, and not much."}
    return {
        name: write_toy_checkpoint(folder / name, script=script, max_context=9000)
        for name, script in scripts.items()
    }


@pytest.fixture(scope="module")
def twins(launcher: Launcher, models: dict[str, Path]) -> list[Running]:
    return [launcher.start(models["babbler"], "--platform", "toy") for _ in range(2)]


@pytest.fixture(scope="module")
def parrot(launcher: Launcher, models: dict[str, Path]) -> Running:
    return launcher.start(models["parrot"], "--platform", "toy")


@dataclass
class Done:
    code: int
    out: str
    err: str
    prefix: Path

    @property
    def report(self) -> dict[str, Any]:
        return json.loads(self.prefix.with_name("it.json").read_text())

    def rows(self, workload: str) -> dict[str, dict[str, Any]]:
        return {r["peer"]: r for r in self.report["rows"] if r["workload"] == workload}


def bench(launcher: Launcher, folder: Path, *arguments: str | Path) -> Done:
    process = subprocess.Popen(
        [*SIXFOLD, *map(str, arguments), "--out", folder / "it"],
        env=launcher.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=2 * DEADLINE)
    finally:
        end(process)
    assert "Traceback" not in err
    return Done(process.returncode, out, err, folder / "it")


def end(process: subprocess.Popen[Any]) -> None:
    """With SIGTERM, so that it stops its servers also where a test gives up."""
    if process.poll() is None:
        process.terminate()
    process.wait(DEADLINE)


def test_running_servers_side_by_side(
    launcher: Launcher, twins: list[Running], parrot: Running, tmp_path: Path
) -> None:
    servers = {"sixfold": twins[0], "twin": twins[1], "parrot": parrot}
    urls = [word for name, s in servers.items() for word in ("--url", f"{name}={s.url}")]
    done = bench(
        launcher, tmp_path, *urls, "--peers", ",".join(servers), "--workloads", "AP", "--rounds", 2,
    )  # fmt: skip
    turns = re.findall(r"^round (\d) (\w) (\w+)", done.err, re.M)
    names = list(servers)
    order = [(1, names), (2, names[::-1])]
    assert turns == [(str(n), w, name) for n, by in order for w in "AP" for name in by]

    rows = done.rows("A")
    assert rows["sixfold"]["likeness"] == rows["twin"]["likeness"] == 1.0
    assert rows["parrot"]["likeness"] < 1.0
    assert [row["errors"] for row in rows.values()] == [0, 0, 0]
    best = max(rows[name]["tokens_per_s"] for name in ("twin", "parrot"))
    assert rows["sixfold"]["ratio"] == pytest.approx(rows["sixfold"]["tokens_per_s"] / best)
    for row in rows.values():
        assert 0 < row["ttft_p50_s"] <= row["ttft_p99_s"]
        assert row["decode_tokens_per_s"] > 0
    runs = done.report["runs"]
    assert runs["sixfold"]["A"][0]["replies"][0]["output_tokens"] == 128
    assert runs["parrot"]["A"][1]["replies"][0]["text"].startswith("It always says")

    # The longer half of P exceeds the toys' context.
    assert done.code == 1
    assert done.rows("P 1024")["sixfold"]["errors"] == 0
    assert done.rows("P 1024")["sixfold"]["ratio"] > 0
    assert done.rows("P 4096")["sixfold"]["errors"] == 2
    assert done.rows("P 4096")["sixfold"]["ratio"] is None
    assert "maximum context length" in done.out

    table = tmp_path / "it.md"
    assert table.read_text() in done.out
    assert re.search(r"^\| A \| parrot \|", table.read_text(), re.M)
    assert (tmp_path / "it.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.log"))


def install(folder: Path, name: str, *lines: str) -> None:
    path = folder / name
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)


@pytest.fixture
def installed(launcher: Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder on PATH. Its `vllm` is Sixfold on the toy under another name."""
    folder = tmp_path / "bin"
    folder.mkdir()
    install(folder, "vllm", f'exec {sys.executable} -m sixfold "$@" --platform toy')
    monkeypatch.setitem(launcher.environment, "PATH", str(folder))
    return folder


def test_launched_missing_and_failing_peers(
    launcher: Launcher, models: dict[str, Path], installed: Path, tmp_path: Path
) -> None:
    install(installed, "mlx_lm.server", "echo starting; echo no such device >&2; exit 3")
    done = bench(
        launcher, tmp_path, models["babbler"], "--peers", "sixfold,llama.cpp,vllm,mlx-lm",
        "--peer-arg", "sixfold=--platform toy", "--workloads", "AS", "--rounds", 1,
    )  # fmt: skip
    assert done.code == 0, done.err
    report = done.report
    assert [peer["name"] for peer in report["peers"]] == ["sixfold", "vllm"]
    assert done.rows("A")["vllm"]["likeness"] == 1.0
    starts = {start["peer"]: start for start in report["starts"]}
    for start in starts.values():
        assert start["cold_start_s"] > 0
        assert start["resident_bytes"] > 2**20
    ratio = starts["vllm"]["cold_start_s"] / starts["sixfold"]["cold_start_s"]
    assert starts["sixfold"]["cold_start_ratio"] == pytest.approx(ratio)

    assert "llama-server is neither" in report["left_out"]["llama.cpp"]
    failed = report["left_out"]["mlx-lm"]
    assert "exit code 3" in failed
    assert "no such device" in failed
    for words in ("llama-server is neither", "no such device"):
        assert words in done.err
        assert words in done.out
    for peer in report["peers"]:
        with pytest.raises(httpx.ConnectError):
            httpx.get(peer["api"])


def test_a_peer_that_refuses_to_chat_is_left_out_at_once(
    launcher: Launcher, installed: Path, tmp_path: Path
) -> None:
    """It would refuse every request of the workloads, however long it is waited for."""
    silent = write_toy_checkpoint(tmp_path / "silent", chat_template=None)
    arguments = ["--peer-arg", "sixfold=--platform toy", "--workloads", "A", "--rounds", 1]
    done = bench(launcher, tmp_path, silent, "--peers", "sixfold", *arguments)
    assert done.code != 0
    assert "it refuses to chat (HTTP 400" in done.err
    assert "no chat template" in done.err


def gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_ctrl_c_ends_every_server(
    launcher: Launcher, models: dict[str, Path], installed: Path, tmp_path: Path
) -> None:
    """While the second peer never becomes ready, the first one waits, suspended."""
    install(installed, "vllm", "exec /bin/sleep 600")
    errors = tmp_path / "errors"
    arguments = ["--peers", "sixfold,vllm", "--peer-arg", "sixfold=--platform toy"]
    with errors.open("w") as file:
        process = subprocess.Popen(
            [*SIXFOLD, models["babbler"], *arguments, "--out", tmp_path / "it"],
            env=launcher.environment, stdout=subprocess.DEVNULL, stderr=file,
            # Tests that run in the background inherit an ignored Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
    try:
        until(lambda: "starting vllm" in errors.read_text(), "the second peer's start")
        family = psutil.Process(process.pid)
        until(lambda: "sleep" in [c.name() for c in family.children()], "the second peer")
        children = family.children(recursive=True)
        ours = [c for c in family.children() if c.name() != "sleep"]
        waiting = [p for c in ours for p in (c, *c.children(recursive=True))]
        assert len(waiting) >= 2  # the server and its engine
        stopped = {psutil.STATUS_STOPPED}
        until(lambda: {p.status() for p in waiting} == stopped, "the first one to stand still")
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(DEADLINE) == 130
    finally:
        end(process)
    until(lambda: all(map(gone, children)), "the end of every server")
    assert "Traceback" not in errors.read_text()


def test_bad_input_is_one_sentence(launcher: Launcher, tmp_path: Path) -> None:
    done = bench(launcher, tmp_path, "--url", "a=http://127.0.0.1:9", "--peers", "a")
    assert done.code == 1
    assert "left out: a: http://127.0.0.1:9/v1/models does not tell" in done.err
    assert "No peer is left" in done.err
    done = bench(launcher, tmp_path / "none", "--workloads", "A")
    assert (done.code, "there is no folder" in done.err) == (2, True)
    done = bench(launcher, tmp_path, "--peers", "vlm")
    assert (done.code, "no peer vlm; there are sixfold" in done.err) == (2, True)
