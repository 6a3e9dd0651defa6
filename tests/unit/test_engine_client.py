"""Contract guarded: server/engine_client.Generation. Outputs come in order and by index, an ended
or stopped sequence says no more, closing aborts what is open, a dead engine ends the wait."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from sixfold.common.errors import EngineDied
from sixfold.common.messages import Output
from sixfold.server.engine_client import Generation


class Client:
    """Stands in for EngineClient: remembers what was aborted."""

    def __init__(self) -> None:
        self.aborted: list[list[str]] = []

    def forget(self, ids: list[str]) -> None:
        if ids:
            self.aborted.append(ids)


def out(request_id: str, *tokens: int, reason: str | None = None) -> Output:
    return Output(request_id=request_id, token_ids=list(tokens), finish_reason=reason)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 10))


def make(*ids: str) -> tuple[Client, Generation]:
    client = Client()
    return client, Generation(client, ids)  # type: ignore[arg-type]


def test_outputs_by_index_until_all_have_ended() -> None:
    async def work() -> None:
        client, generation = make("a", "b")
        generation.deliver(out("b", 1))
        generation.deliver(out("a", 2, reason="stop"))
        got = await generation.next()
        assert [(index, output.token_ids) for index, output in got] == [(1, [1]), (0, [2])]
        waiting = asyncio.ensure_future(generation.next())
        await asyncio.sleep(0)
        assert not waiting.done()
        generation.deliver(out("b", 3, reason="length"))
        assert [index for index, _ in await waiting] == [1]
        assert await generation.next() == []
        generation.close()
        assert client.aborted == []

    run(work())


def test_stop_aborts_one_and_drops_its_late_outputs() -> None:
    async def work() -> None:
        client, generation = make("a", "b")
        generation.stop(0)
        generation.stop(0)
        generation.deliver(out("a", 1))
        generation.deliver(out("b", 2))
        assert [(index, o.token_ids) for index, o in await generation.next()] == [(1, [2])]
        generation.close()
        generation.close()
        assert client.aborted == [["a"], ["b"]]
        assert await generation.next() == []

    run(work())


def test_a_dead_engine_ends_the_wait_after_what_had_arrived() -> None:
    async def work() -> None:
        _, generation = make("a")
        waiting = asyncio.ensure_future(generation.next())
        await asyncio.sleep(0)
        generation.deliver(out("a", 1))
        generation.fail(EngineDied("gone"))
        assert [o.token_ids for _, o in await waiting] == [[1]]
        with pytest.raises(EngineDied, match="gone"):
            await generation.next()

    run(work())
