"""How far a start is, on standard error: a bar per stage, such as the weights or the decode steps
that are captured one bucket after another. Where nobody watches, a line per stage."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from ..common.messages import Loading

MOST_COUNTED = 1000
"""Totals up to this are things of which each is told, as buckets are; larger ones are bytes."""


class LoadingBar:
    """`console` is a test's own."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._stage = ""
        self._progress: Progress | None = None

    def show(self, message: Loading) -> None:
        if message.stage != self._stage:
            self.close()
            self._stage = message.stage
            if self._console.is_terminal:
                self._progress = self._started(message)
            else:
                self._console.print(
                    f"{message.stage} ...", highlight=False, markup=False, soft_wrap=True
                )
        if self._progress is not None:
            (task,) = self._progress.task_ids
            counted = f"{message.done}/{message.total}" if message.total <= MOST_COUNTED else ""
            total = message.total or None
            self._progress.update(task, completed=message.done, total=total, counted=counted)

    def close(self) -> None:
        """The last stage's bar stays to be read."""
        if self._progress is not None:
            self._progress.stop()
        self._progress, self._stage = None, ""

    def _started(self, message: Loading) -> Progress:
        progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[counted]}", markup=False),
            TimeElapsedColumn(),
            console=self._console,
        )
        progress.add_task(message.stage, total=message.total or None, counted="")
        progress.start()
        return progress
