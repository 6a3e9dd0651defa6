"""Contract guarded: loading, leaving clients, full queues, draining, and every way to die. Nothing
hangs: each open request ends with an error, and the exit code says how the server ended."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from serving import DEADLINE, Launcher, Running, until
from toy_checkpoint import write_toy_checkpoint


def long_body(server: Running, **fields: Any) -> dict[str, Any]:
    """A completion that runs far longer than any test waits."""
    limit = server.http.get("/v1/platform").json()["max_context"]
    body = {"model": server.model, "prompt": "Go on", "max_tokens": limit - 64, "ignore_eos": True}
    return {**body, **fields}


class Stream:
    """A streamed completion in a thread of its own, read until it ends."""

    def __init__(self, server: Running, **fields: Any) -> None:
        self._body = long_body(server, stream=True, **fields)
        self._http, self._patience = server.http, server.deadline
        self._answered = threading.Event()
        self._status = 0
        self.events: list[str] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            with self._http.stream("POST", "/v1/completions", json=self._body) as response:
                self._status = response.status_code
                self._answered.set()
                self.events += (line for line in response.iter_lines() if line)
        except httpx.HTTPError as error:
            self.events.append(f"broken: {error}")
        self._answered.set()

    @property
    def status(self) -> int:
        """Waits for the head of the answer."""
        assert self._answered.wait(self._patience)
        return self._status

    def end(self) -> list[str]:
        self._thread.join(self._patience)
        assert not self._thread.is_alive()
        return self.events


def begin(server: Running, **fields: Any) -> httpx.Response:
    """A stream whose first bytes have arrived."""
    client = server.http
    request = client.build_request(
        "POST", "/v1/completions", json=long_body(server, stream=True, **fields)
    )
    return client.send(request, stream=True)


def test_a_client_that_leaves_a_stream_frees_its_rows(server: Running) -> None:
    aborted = server.metric("request_aborted_total")
    response = begin(server, n=3)
    assert response.status_code == 200
    server.until_running(3)
    response.close()
    server.until_running(0)
    assert server.metric("request_aborted_total") == aborted + 1
    usage = server.metric('kv_cache_usage_ratio{group="full"}')
    assert usage == 0.0


def test_a_client_that_leaves_a_whole_answer_frees_its_row(server: Running) -> None:
    body = json.dumps(long_body(server)).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            + f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        server.until_running(1)
    server.until_running(0)


def test_a_stop_string_frees_the_row(server: Running) -> None:
    text = server.http.post("/v1/completions", json=long_body(server, max_tokens=8, seed=1)).json()
    stop = text["choices"][0]["text"][2:4]
    body = long_body(server, stop=stop, seed=1)
    assert server.http.post("/v1/completions", json=body).json()["choices"][0]["text"]
    server.until_running(0)


def test_queue_full_is_429_with_retry_after(launcher: Launcher, few_rows: list[str]) -> None:
    server = launcher.start(*few_rows, "--max-rows", 1, "--max-queue", 2)
    running = begin(server)
    server.until_running(1)
    waiting = [Stream(server) for _ in range(2)]
    waits = "num_requests_waiting"
    until(lambda: server.metric(waits) == 2, "two to wait", server.deadline)
    refused = server.http.post("/v1/completions", json=long_body(server))
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["code"] == "queue_full"
    assert refused.json()["error"]["type"] == "rate_limit_error"
    # More at once than could ever wait is no matter of time.
    never = server.http.post("/v1/completions", json=long_body(server, n=3))
    assert (never.status_code, never.json()["error"]["param"]) == (400, "n")
    with pytest.raises(openai.RateLimitError):
        server.openai().completions.create(model=server.model, prompt="x")
    running.close()
    server.process.kill()
    for stream in waiting:
        assert stream.end()


def test_killed_engine_ends_streams_and_server(launcher: Launcher, few_rows: list[str]) -> None:
    server = launcher.start(*few_rows)
    engine = server.engine_pid()
    streams = [Stream(server) for _ in range(3)]
    assert [stream.status for stream in streams] == [200] * 3
    whole: list[httpx.Response] = []
    asker = threading.Thread(
        target=lambda: whole.append(server.http.post("/v1/completions", json=long_body(server)))
    )
    asker.start()
    server.until_running(4)
    os.kill(engine, signal.SIGKILL)
    for stream in streams:
        last = json.loads(stream.end()[-1].removeprefix("data: "))
        assert last["error"]["code"] == "engine_dead"
        assert "data: [DONE]" not in stream.events
    asker.join(server.deadline)
    assert whole[0].status_code == 503
    assert whole[0].json()["error"]["code"] == "engine_dead"
    assert whole[0].headers["retry-after"]
    assert server.exit_code() == 1
    assert "by signal 9" in server.log.read_text()


def test_killed_server_takes_its_engine_along(launcher: Launcher, few_rows: list[str]) -> None:
    server = launcher.start(*few_rows)
    engine = psutil.Process(server.engine_pid())
    stream = Stream(server)
    assert stream.status == 200
    server.process.kill()
    engine.wait(server.deadline)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_drains(
    launcher: Launcher, few_rows: list[str], number: signal.Signals, platform: str
) -> None:
    server = launcher.start(*few_rows, "--drain-timeout", launcher.deadline)
    http = server.http
    # Long enough to be running when the signal comes, on the toy too.
    stream = Stream(server, max_tokens=2000 if platform == "toy" else 60)
    assert stream.status == 200
    server.process.send_signal(number)
    until(lambda: http.get("/ready").status_code == 503, "not ready any more", server.deadline)
    refused = http.post("/v1/completions", json={"model": server.model, "prompt": "x"})
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "draining"
    assert refused.headers["retry-after"]
    assert http.get("/health").status_code == 200
    assert stream.end()[-1] == "data: [DONE]"
    assert server.exit_code() == 0


def test_drain_timeout_ends_what_still_runs(launcher: Launcher, few_rows: list[str]) -> None:
    server = launcher.start(*few_rows, "--drain-timeout", 0.2)
    stream = Stream(server)
    assert stream.status == 200
    server.terminate()
    assert "error" in json.loads(stream.end()[-1].removeprefix("data: "))
    assert server.exit_code() == 1


def test_second_signal_does_not_wait(launcher: Launcher, few_rows: list[str]) -> None:
    server = launcher.start(*few_rows, "--drain-timeout", 600)
    stream = Stream(server)
    assert stream.status == 200
    server.terminate()
    http = server.http
    until(lambda: http.get("/ready").status_code == 503, "not ready any more", server.deadline)
    server.terminate()
    assert "error" in json.loads(stream.end()[-1].removeprefix("data: "))
    assert server.exit_code() == 1


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_while_loading_503_says_how_far(launcher: Launcher, toy_model: Path, faults: Path) -> None:
    (faults / "hold").touch()
    port = free_port()
    server = launcher.start(toy_model, "--platform", "faulty", "--port", port, wait=False)
    server.url = f"http://127.0.0.1:{port}"

    def loading() -> httpx.Response | None:
        try:
            response = server.http.get("/ready")
        except httpx.TransportError:
            return None
        return response if "25 %" in response.text else None

    response = until(loading, "progress")
    assert response.status_code == 503
    assert response.headers["retry-after"]
    assert response.json()["error"]["code"] == "loading"
    assert server.http.get("/health").json() == {"status": "loading"}
    assert server.http.get("/metrics").status_code == 200
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize"):
        assert server.http.post(path, json={}).status_code == 503
    assert server.http.get("/v1/models").status_code == 503
    (faults / "hold").unlink()
    until(lambda: server.http.get("/ready").status_code == 200, "ready")
    server.terminate()
    assert server.exit_code() == 0


def test_signal_while_loading_ends_at_once(
    launcher: Launcher, toy_model: Path, faults: Path
) -> None:
    (faults / "hold").touch()
    server = launcher.start(toy_model, "--platform", "faulty", wait=False)
    until(lambda: "loading weights" in server.log.read_text(), "loading")
    server.terminate()
    assert server.exit_code() == 0


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("fail", "Error: The toy needs 4 bytes and there are 3. Use a smaller toy.\n"),
        ("crash", "Error: The engine process has ended by signal 6.\n"),
    ],
)
def test_engine_that_cannot_start(
    launcher: Launcher, toy_model: Path, faults: Path, fault: str, sentence: str
) -> None:
    (faults / fault).touch()
    server = launcher.start(toy_model, "--platform", "faulty", wait=False)
    assert server.exit_code() == 1
    log = server.log.read_text()
    assert log.endswith(sentence)
    assert "Traceback" not in log


def test_a_broken_step_ends_streams_and_server(
    launcher: Launcher, toy_model: Path, faults: Path
) -> None:
    server = launcher.start(toy_model, "--platform", "faulty")
    streams = [Stream(server) for _ in range(2)]
    assert [stream.status for stream in streams] == [200, 200]
    (faults / "break").touch()
    for stream in streams:
        last = stream.end()[-1]
        assert "error" in json.loads(last.removeprefix("data: "))
        assert "Traceback" not in last
    assert server.exit_code() == 1


def test_what_it_prints_to_paste_works(launcher: Launcher, toy_model: Path, tmp_path: Path) -> None:
    """Also for a model that cannot chat: that one is told to complete."""
    silent = write_toy_checkpoint(tmp_path / "silent", chat_template=None)
    for model, path in ((toy_model, "/v1/chat/completions"), (silent, "/v1/completions")):
        running = launcher.start(model, "--platform", "toy")
        command = shlex.split(running.lines[-1])
        assert command[1] == running.url + path
        answer = httpx.post(command[1], json=json.loads(command[-1]), timeout=DEADLINE)
        assert answer.json()["choices"], answer.text
    assert "no chat template (--chat-template" in "".join(running.lines)


def test_port_in_use_is_one_sentence(launcher: Launcher, toy_model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = launcher.run("serve", toy_model, "--platform", "toy", "--port", port)
    assert done.returncode == 2
    assert done.stderr.startswith(f"Error: Port {port} on 127.0.0.1 is in use.")
    assert done.stderr.count("\n") == 1
