"""A scheduler over a device that always samples the same token, to look at the steps it builds."""

from __future__ import annotations

from typing import Any

import numpy as np
from support.mock_executor import group, mock_info

from sixfold.common.config import EngineConfig
from sixfold.common.messages import AddRequest, Output
from sixfold.common.sampling import SamplingParams
from sixfold.common.scheduler.scheduler import Scheduler
from sixfold.common.telemetry.load import LoadCounters
from sixfold.platforms.interface_step import StepBatch, StepResult, Want

EOS = 0
TOKEN = 7


class Bench:
    """A scheduler whose device samples the same token for ever."""

    def __init__(self, *groups: Any, **changes: Any) -> None:
        names = {"max_queue", "prefix_cache", "eviction"} & set(changes)
        config = EngineConfig(**{name: changes.pop(name) for name in names})
        self.info = mock_info(groups or (group("full", 64, 4),), **changes)
        self.counters = LoadCounters()
        self.scheduler = Scheduler(self.info, config, frozenset({EOS}), self.counters)
        self.outputs: list[Output] = []
        self._batches: list[StepBatch] = []

    def add(self, name: str, length: int, priority: int = 0, first: int = 1, **params: Any) -> None:
        prompt = [(first + i) % 30 + 1 for i in range(length)]
        self.add_ids(name, prompt, priority, **params)

    def add_ids(self, name: str, prompt: list[int], priority: int = 0, **params: Any) -> None:
        sampling = SamplingParams(**{"max_tokens": 8, "temperature": 0.0, **params})
        self.scheduler.add(
            AddRequest(request_id=name, prompt_ids=prompt, params=sampling, priority=priority)
        )

    def submit(self) -> StepBatch | None:
        batch = self.scheduler.schedule()
        if batch is not None:
            self._batches.append(batch)
        return batch

    def collect(self, token: int = TOKEN) -> list[Output]:
        batch = self._batches.pop(0)
        ids = np.where(batch.want & Want.SAMPLE, token, -1).astype(np.int32)[:, None]
        result = StepResult(batch.step, ids, (ids[:, 0] >= 0).astype(np.int32))
        outputs = list(self.scheduler.apply(result))
        self.outputs += outputs
        return outputs

    def step(self, token: int = TOKEN) -> StepBatch:
        batch = self.submit()
        assert batch is not None
        self.collect(token)
        return batch

    def finish(self) -> None:
        while self.scheduler.running or self.scheduler.waiting:
            self.step()

    def running(self) -> list[str]:
        return [row.request_id for row in self.scheduler._running]


def lengths(batch: StepBatch) -> list[int]:
    return np.diff(batch.query_start).tolist()
