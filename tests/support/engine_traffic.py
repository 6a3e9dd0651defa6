"""Drives an Engine over the mock executor: arrivals, aborts, an audit of the cache after every
step, and the comparison of every output with what the request gives alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from support.mock_executor import MockExecutor
from support.mock_model import Alone, alone

from sixfold.common.cache.kv_cache import KVCache
from sixfold.common.config import EngineConfig
from sixfold.common.engine import Engine
from sixfold.common.messages import AddRequest, Image, Output
from sixfold.common.random import uniform
from sixfold.common.sampling import SamplingParams
from sixfold.platforms.interface import ExecutorInfo

EOS = frozenset({0})


class Wrong(AssertionError):
    """An output, or the cache, is not what it must be."""


def draw(seed: int, position: int) -> float:
    return float(uniform(np.array([seed]), np.array([position]))[0])


@dataclass
class Heard:
    """All that was said about one request."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: list[Any] | None = None
    cached: int | None = None
    finish_reason: str | None = None
    stop_token: int | None = None
    messages: int = 0
    error: Any = None

    def take(self, output: Output) -> None:
        if self.finish_reason is not None:
            raise Wrong(f"a message after the last: {output}")
        self.tokens += output.token_ids
        for entry in output.logprobs or []:
            self.logprobs.append(entry.logprob)
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        if output.cached_tokens is not None:
            self.cached = output.cached_tokens
        self.finish_reason, self.stop_token = output.finish_reason, output.stop_token_id
        self.messages += 1
        self.error = output.error


@dataclass(frozen=True)
class Arrival:
    """A request, when it comes, and when it is given up (steps; None = never)."""

    at: int
    prompt: list[int]
    params: SamplingParams
    priority: int = 0
    abort_at: int | None = None
    images: tuple[Image, ...] = ()
    see: Any = None  # as `alone` takes it


def run(engine: Engine, arrivals: list[Arrival], audit: bool = True) -> list[Heard]:
    """All arrivals to their end. Raises Wrong when the engine stops getting on."""
    heard = {str(i): Heard() for i in range(len(arrivals))}
    patience = 200 + 20 * sum(len(a.prompt) + 64 for a in arrivals)
    last = max((max(a.at, a.abort_at or 0) for a in arrivals), default=0)
    step = 0
    while step <= last or engine.has_work:
        for i, arrival in enumerate(arrivals):
            if arrival.at == step:
                engine.add(
                    AddRequest(
                        request_id=str(i),
                        prompt_ids=arrival.prompt,
                        params=arrival.params,
                        priority=arrival.priority,
                        images=list(arrival.images),
                    )
                )
            if arrival.abort_at == step:
                engine.abort([str(i)])
        for output in engine.step():
            heard[output.request_id].take(output)
        if audit:
            audit_cache(engine)
            spoil_free_slots(engine)
        step += 1
        if step > patience:
            raise Wrong(f"the engine makes no progress: {engine.stats()}")
    return list(heard.values())


Oracle = Callable[[Arrival, ExecutorInfo], Alone]
"""What a request gives alone."""


def hashed(arrival: Arrival, info: ExecutorInfo) -> Alone:
    return alone(arrival.prompt, arrival.params, info, EOS, draw, arrival.see)


def compare(
    arrivals: Iterable[Arrival],
    heard: Iterable[Heard],
    info: ExecutorInfo,
    oracle: Oracle = hashed,
    apart: float = 1e-8,
) -> None:
    """`apart`: how far log-probabilities may be from the oracle's."""
    for arrival, said in zip(arrivals, heard, strict=True):
        want = oracle(arrival, info)
        if said.finish_reason == "abort" and arrival.abort_at is not None:
            if said.tokens != want.tokens[: len(said.tokens)]:
                raise Wrong(f"{said.tokens} is no beginning of {want.tokens}")
            continue
        found = (said.tokens, said.finish_reason, said.stop_token)
        if found != (want.tokens, want.finish_reason, want.stop_token):
            raise Wrong(f"{arrival}: got {found}, alone it gives {want}")
        _compare_logprobs(arrival, said, want, apart)


def _compare_logprobs(arrival: Arrival, said: Heard, want: Alone, apart: float) -> None:
    if arrival.params.logprobs is not None and not np.allclose(
        said.logprobs, want.logprobs, atol=apart
    ):
        raise Wrong(f"{arrival}: log-probabilities {said.logprobs}, not {want.logprobs}")
    if arrival.params.prompt_logprobs is not None:
        if said.prompt_logprobs is None or said.prompt_logprobs[0] is not None:
            raise Wrong(f"{arrival}: prompt log-probabilities {said.prompt_logprobs}")
        rest = said.prompt_logprobs[1:]
        if [e.token_id for e in rest] != arrival.prompt[1:] or not np.allclose(
            [e.logprob for e in rest], want.prompt_logprobs, atol=apart
        ):
            raise Wrong(f"{arrival}: prompt log-probabilities {rest}")


def serve(
    info: ExecutorInfo,
    config: EngineConfig,
    arrivals: list[Arrival],
    lazy: bool = True,
    audit: bool = True,
    make: type[MockExecutor] = MockExecutor,
    prepare: Callable[[Engine], object] = lambda engine: None,
) -> tuple[Engine, Any, list[Heard]]:
    """Run, compare with the oracle, and check that nothing is left in the cache."""
    executor = make(info, lazy)
    engine = Engine(executor, info, config, EOS)
    prepare(engine)
    heard = run(engine, arrivals, audit)
    compare(arrivals, heard, info)
    audit_empty(engine)
    return engine, executor, heard


def quiet(config: EngineConfig | None = None, **changes: Any) -> EngineConfig:
    return replace(config or EngineConfig(), **changes)


# ---- audits: recount by brute force what the pools keep by counters


def audit_cache(engine: Engine) -> None:
    scheduler = engine._scheduler
    cache = scheduler.cache
    sequences = [row.sequence for row in scheduler._running]
    nodes = _nodes(cache)
    for g, pool in enumerate(cache.pools):
        used: Counter[int] = Counter()
        for sequence in sequences:
            used.update(p for p in cache.tables[g][sequence.handle].tolist() if p)
        holders = {node.pages[g]: node for node in nodes if node.pages[g]}
        free = set(pool._free)
        if len(free) != pool.free or 0 in free or 0 in used or 0 in holders:
            raise Wrong(f"{pool.group.name}: the free list holds a page twice, or the null page")
        for page in range(1, pool.group.pages):
            if pool.rows(page) != used[page]:
                raise Wrong(f"{pool.group.name}: page {page} counts {pool.rows(page)} rows")
            if pool.holder(page) is not holders.get(page):
                raise Wrong(f"{pool.group.name}: page {page} has a holder outside the tree")
            if (page in free) == bool(used[page] or page in holders):
                raise Wrong(f"{pool.group.name}: page {page} is lost or free while in use")
        pool.check()
        if pool.group.kind.keeps_all:
            for node in nodes:
                if not node.pages[g] or (
                    node.parent.parent
                    and pool.rows(node.pages[g]) > pool.rows(node.parent.pages[g])
                ):
                    raise Wrong(f"{pool.group.name}: a prefix has a hole")
    attached = Counter(id(sequence.node) for sequence in sequences)
    if any(node.rows != attached[id(node)] for node in nodes):
        raise Wrong("a node counts rows that are not there")


def spoil_free_slots(engine: Engine) -> None:
    """What a free slot of a recurrent group holds is nobody's, but for copies still owed of it."""
    cache, executor = engine._scheduler.cache, engine._executor
    if cache.states._promises:
        raise Wrong("a snapshot is promised and no step is being built")
    if engine._scheduler.in_flight or not isinstance(executor, MockExecutor):
        return
    owed = {(move.group, move.source) for move in cache.states._moves}
    for g in cache.recurrent:
        pool = cache.pools[g]
        executor.spoil(g, [s for s in pool._free if (pool.group.name, s) not in owed])


def _nodes(cache: KVCache) -> list[Any]:
    found, todo = [], list(cache.tree.root.children.values())
    while todo:
        node = todo.pop()
        found.append(node)
        todo += node.children.values()
    return found


def audit_empty(engine: Engine) -> None:
    """With no request open nothing is pinned, and the tree gives everything back."""
    audit_cache(engine)
    cache = engine._scheduler.cache
    for pool in cache.pools:
        if pool.pinned:
            raise Wrong(f"{pool.group.name}: {pool.pinned} pages are still in use")
    cache.clear()
    for pool in cache.pools:
        if pool.free != pool.total:
            raise Wrong(f"{pool.group.name}: {pool.total - pool.free} pages leaked")
    if cache.tree.root.children or cache.tree.root.rows:
        raise Wrong("the tree is not empty")
    if any(table.any() for table in cache.tables) or len(cache._handles) != len(cache.tables[0]):
        raise Wrong("a page table line was not given back")
