"""Counters of the engine's load and the snapshot that is sent to the front end."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..messages import EngineStats


@dataclass(slots=True)
class LoadCounters:
    """Counters since the engine started; they only grow."""

    steps: int = 0
    prompt_tokens: int = 0  # prompt positions computed, again after a preemption
    cached_tokens: int = 0  # prompt positions taken from the prefix tree instead
    output_tokens: int = 0
    preemptions: int = 0
    drafted_tokens: int = 0
    accepted_drafts: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    step_seconds: float = 0.0  # host time inside Engine.step
    device_seconds: float = 0.0

    def finish(self, reason: str) -> None:
        self.finished[reason] = self.finished.get(reason, 0) + 1

    def snapshot(self, waiting: int, running: int, pages: dict[str, list[int]]) -> EngineStats:
        """pages: group -> [free, evictable, pinned, total]."""
        return EngineStats(
            waiting=waiting,
            running=running,
            pages=pages,
            steps=self.steps,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            output_tokens=self.output_tokens,
            preemptions=self.preemptions,
            drafted_tokens=self.drafted_tokens,
            accepted_drafts=self.accepted_drafts,
            finished=dict(self.finished),
            step_seconds=self.step_seconds,
            device_seconds=self.device_seconds,
        )
