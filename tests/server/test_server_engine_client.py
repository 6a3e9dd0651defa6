"""Contract guarded: server/engine_client.EngineClient with a real engine process, also where unix
sockets cannot be used; it leaves neither processes nor files."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import psutil
import pytest
from serving import DEADLINE, Launcher

from sixfold.common.config import EngineConfig
from sixfold.common.errors import EngineDied, SixfoldError
from sixfold.common.sampling import SamplingParams
from sixfold.server import engine_client
from sixfold.server.early_engine import EarlyEngine
from sixfold.server.engine_client import EngineClient, Wanted
from sixfold.server.launch import Located

PARAMS = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)


@pytest.fixture(autouse=True)
def installed(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy platform in this process, and by that in those it spawns."""
    monkeypatch.syspath_prepend(str(launcher.folder / "env"))


async def complete(client: EngineClient, prompt: bytes) -> list[int]:
    generation = client.submit([Wanted(list(prompt), PARAMS)])
    tokens: list[int] = []
    while outputs := await generation.next():
        for _, output in outputs:
            assert output.error is None
            tokens += output.token_ids
    return tokens


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_life_of_an_engine_process(
    toy_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, transport: str
) -> None:
    monkeypatch.setattr(engine_client.tempfile, "tempdir", str(tmp_path))
    if transport == "tcp":
        monkeypatch.setattr(engine_client, "UNIX_PATH_LIMIT", 0)

    async def work() -> None:
        client = EngineClient(EngineConfig(platform="toy"), Located(toy_model, "given"))
        ready = await client.start()
        assert ready.platform == "toy"
        assert len(list(tmp_path.iterdir())) == 1
        assert os.stat(next(tmp_path.iterdir())).st_mode & 0o077 == 0
        answers = await asyncio.gather(*(complete(client, b"Hello %d" % i) for i in range(5)))
        assert [len(tokens) for tokens in answers] == [5] * 5
        assert await complete(client, b"Hello 3") == answers[3]
        assert client.open_sequences == 0
        pid = client.pid
        assert await client.stop(drain_seconds=DEADLINE)
        assert await client.stop(drain_seconds=0)
        assert pid is not None
        assert not psutil.pid_exists(pid)
        with pytest.raises(EngineDied):
            client.submit([Wanted([1], PARAMS)])

    asyncio.run(asyncio.wait_for(work(), DEADLINE))
    assert list(tmp_path.iterdir()) == []


def test_an_engine_started_early_serves_and_one_not_needed_ends(toy_model: Path) -> None:
    spare = EarlyEngine(EngineConfig(platform="toy"), "warning")
    broken = EarlyEngine(EngineConfig(platform="gameboy"), "warning")

    async def work() -> None:
        early = EarlyEngine(EngineConfig(platform="toy"), "warning")
        client = EngineClient(
            EngineConfig(platform="toy"), Located(toy_model, "given"), early=early
        )
        assert (await client.start()).platform == "toy"
        assert client.pid == early.process.pid
        early.close()  # begun, so it is the client's
        assert len(await complete(client, b"Hello")) == 5
        assert await client.stop(drain_seconds=DEADLINE)

    async def refused() -> None:
        client = EngineClient(
            EngineConfig(platform="gameboy"), Located(toy_model, "given"), early=broken
        )
        try:
            await client.start()
        finally:
            await client.stop(0)

    asyncio.run(asyncio.wait_for(work(), DEADLINE))
    with pytest.raises(SixfoldError, match="gameboy"):
        asyncio.run(asyncio.wait_for(refused(), DEADLINE))
    spare.close()
    spare.close()
    assert not spare.process.is_alive()


def test_a_refused_request_ends_with_its_error(toy_model: Path) -> None:
    async def work() -> None:
        client = EngineClient(EngineConfig(platform="toy"), Located(toy_model, "given"))
        ready = await client.start()
        generation = client.submit([Wanted([1] * ready.max_context, PARAMS)])
        ((index, output),) = await generation.next()
        assert (index, output.finish_reason) == (0, "error")
        assert output.error is not None
        assert output.error.code == "context_length_exceeded"
        assert await generation.next() == []
        await client.stop(0)

    asyncio.run(asyncio.wait_for(work(), DEADLINE))


def test_failures_of_the_start_are_sentences(toy_model: Path) -> None:
    async def start(config: EngineConfig, model: Path) -> None:
        client = EngineClient(config, Located(model, "given"))
        try:
            await client.start()
        finally:
            await client.stop(0)

    for config, model, words in (
        (EngineConfig(platform="gameboy"), toy_model, "gameboy"),
        (EngineConfig(platform="toy", device_index=3), toy_model, "device_index 3"),
        (EngineConfig(platform="toy"), toy_model.parent / "nothing", "nothing"),
    ):
        with pytest.raises(SixfoldError, match=words):
            asyncio.run(asyncio.wait_for(start(config, model), DEADLINE))
