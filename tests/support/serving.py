"""`sixfold serve` as users run it: a subprocess, found by the address that it prints."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from toy_checkpoint import toy_environment

DEADLINE = 60.0
"""Seconds after which a condition that was waited for counts as failed."""

Options = dict[str, Any]
"""Fields of EngineConfig."""


def until(condition: Callable[[], Any], what: str, seconds: float = DEADLINE) -> Any:
    """The first true value of `condition`; fails after the deadline."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            pytest.fail(f"waited {seconds} s for: {what}")
        time.sleep(0.01)
    return value


@dataclass
class Running:
    """One `sixfold serve` process."""

    process: subprocess.Popen[str]
    log: Path
    url: str = ""
    model: str = ""
    lines: list[str] = field(default_factory=list)
    deadline: float = DEADLINE

    @property
    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=self.deadline)

    def openai(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1",
            **{"api_key": "none", "max_retries": 0, "timeout": self.deadline, **options},
        )

    def metric(self, name: str) -> float:
        text = self.http.get("/metrics").text
        found = re.findall(rf"^sixfold_{re.escape(name)} (\S+)$", text, re.M)
        return float(found[0]) if found else 0.0

    def until_running(self, count: int) -> None:
        wanted = f"{count} running"
        until(lambda: self.metric("num_requests_running") == count, wanted, self.deadline)

    def engine_pid(self) -> int:
        children = psutil.Process(self.process.pid).children(recursive=True)
        engines = [c.pid for c in children if "spawn_main" in " ".join(c.cmdline())]
        assert len(engines) == 1
        return engines[0]

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def exit_code(self) -> int:
        return self.process.wait(self.deadline)


class Launcher:
    """Starts servers in an environment where the toy platforms are installed; ends them all."""

    def __init__(self, folder: Path, deadline: float = DEADLINE) -> None:
        """`deadline`: seconds that an answer of these servers may take."""
        self.folder = folder
        self.deadline = deadline
        self.faults = folder / "env" / "faults"
        self.environment = toy_environment(folder / "env")
        _install_faulty(folder / "env")
        self._running: list[Running] = []

    def start(self, *arguments: str | Path, wait: bool = True) -> Running:
        """`sixfold serve <arguments>` on any free port, and with `wait` until it is ready."""
        port = () if "--port" in arguments else ("--port", "0")
        log = self.folder / f"serve-{len(self._running)}.log"
        with log.open("w") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "sixfold", "serve", *map(str, arguments), *port],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=self.environment,
            )
        running = Running(process, log, deadline=self.deadline)
        self._running.append(running)
        if wait:
            self.wait_ready(running)
        return running

    def wait_ready(self, running: Running) -> None:
        assert running.process.stdout is not None
        for line in running.process.stdout:
            running.lines.append(line)
            if line.startswith("curl "):
                break
        else:
            pytest.fail(f"the server did not start: {running.log.read_text()}")
        running.url = re.findall(r"at (http://\S+)", "".join(running.lines))[0]
        running.model = json.loads(running.lines[-1].split(" -d ")[1].strip("'\n"))["model"]

    def run(self, *arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
        """`sixfold <arguments>` to its end."""
        return subprocess.run(
            [sys.executable, "-m", "sixfold", *map(str, arguments)],
            capture_output=True,
            text=True,
            env=self.environment,
            timeout=self.deadline,
            **options,
        )

    def close(self) -> None:
        for running in self._running:
            if running.process.poll() is None:
                running.process.kill()
            running.process.wait()
            if running.process.stdout is not None:
                running.process.stdout.close()


def _install_faulty(folder: Path) -> None:
    source = Path(__file__).parent / "faulty_platform.py"
    (folder / source.name).write_text(source.read_text())
    (folder / "faults").mkdir(exist_ok=True)
    _declare(folder, "faulty", "faulty_platform:FaultyPlatform")


HOSTED = {
    "emulated_npu": "support.emulated_npu.platform:PLATFORM",
    "interpreted_cuda": "support.interpreted_devices:CUDA",
    "interpreted_rocm": "support.interpreted_devices:ROCM",
    "interpreted_xpu": "support.interpreted_devices:XPU",
    "hosted_xpu": "support.interpreted_devices:XPU_WITHOUT_TRITON",
}
"""Platforms of devices that are not here: name -> where it is. They serve a tiny model."""

PATIENCE = 900.0
"""Seconds for an answer of the demo model there."""

# In the interpreter Triton's attention takes seconds a token, and these two ops most of what is
# left: the tests of text have them.
_TORCHS = {"attention": "sdpa", "rope": "generic", "kv_write": "generic"}
_INTERPRETED: Options = {"dtype": "float32", "kernels": _TORCHS}
SERVING_DEMO: dict[str, Options] = {
    "emulated_npu": {"dtype": "bfloat16", "max_rows": 32},
    "interpreted_cuda": _INTERPRETED,
    "interpreted_rocm": _INTERPRETED,
    "interpreted_xpu": _INTERPRETED,
    "hosted_xpu": {"dtype": "float32"},
}
"""What such a platform is asked for where it serves the demo model."""

_TRITONS = "embedding rope silu_mul rms_norm add_rms_norm kv_write page_copy sample draw".split()
WITHOUT_TRITON = {"attention": "sdpa", **dict.fromkeys(_TRITONS, "generic")}
"""Of the ops of a Llama with plain matrices, those for which Triton comes first -> torch's."""

NAMED: dict[str, Options] = {"hosted_xpu": {"kernels": WITHOUT_TRITON}}
"""What such a platform is asked for with any model."""


def arguments(options: Options) -> list[str]:
    """Fields of EngineConfig as `sixfold serve` takes them."""
    fields = {name: value for name, value in options.items() if name not in ("model", "kernels")}
    flags = [[f"--{name.replace('_', '-')}", str(value)] for name, value in fields.items()]
    flags += [["--kernel", f"{op}={name}"] for op, name in options.get("kernels", {}).items()]
    return [*filter(None, [options.get("model")]), *(word for flag in flags for word in flag)]


def install_hosted(folder: Path, name: str) -> None:
    """Declared only where it is asked for: it imports torch."""
    source = Path(__file__).parent
    if not (folder / source.name).exists():
        (folder / source.name).symlink_to(source)
    _declare(folder, name, HOSTED[name])


def _declare(folder: Path, name: str, platform: str) -> None:
    info = folder / f"sixfold_{name}-1.0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sixfold-{name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[sixfold.platforms]\n{name} = {platform}\n")
