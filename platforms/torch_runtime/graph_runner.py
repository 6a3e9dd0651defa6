"""Captured decode steps, by number of rows. The same for every device that records its work.

A step whose rows have one new token each goes through the buffers of the smallest bucket that holds
it: its plan is made on the host, copied into the bucket's reserved buffers, and the bucket's
recording is replayed. Rows that a bucket has too many read and write the null page. Every other
step runs op by op on fresh buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...common.errors import KernelError
from ..interface import Decision, LoadProgress
from ..interface_step import StepBatch
from .captured_draw import CapturedDraw, plan_draw
from .step_program import NotCaptured, StepProgram

Work = Callable[[], Tensor]
"""Device work on fixed buffers; its result is valid until it is done again."""

Record = Callable[[Work], Work]
"""Captures a piece of work and gives back its replay. Recordings may share memory: none of them
relies on what another left, other than in its reserved buffers."""

AGREEMENT = 1e-2
"""Largest difference between a replay and the work recorded, as a share of the largest value: two
runs of one kernel may sum in another order, a broken recording is wrong altogether."""


def bucket_sizes(most: int) -> list[int]:
    """Rows of the buckets up to `most`: in steps of eight, and from 64 on of an eighth to a quarter
    of what came before."""
    sizes = [size for size in (1, 2, 4) if size < most]
    size = 8
    while size < most:
        sizes.append(size)
        size += max(8, (1 << size.bit_length()) // 8)
    return [*sizes, most]


class Bucket:
    """The buffers of steps with up to `rows` rows, and their work: first op by op, then replayed.

    `inputs` (2, rows) int64: token ids and positions.
    """

    def __init__(self, program: StepProgram, rows: int, device: torch.device) -> None:
        self.rows = rows
        self.inputs = torch.zeros((2, rows), dtype=torch.int64, device=device)
        self.reserved = program.reserve(rows, rows)
        self._program = program
        bound = program.bind(program.plan(program.rehearsal([1] * rows)), self.reserved)
        self.work: Work = lambda: program.forward(self.inputs[0], self.inputs[1], bound)
        self.draw = CapturedDraw(program.draw, self.work())

    def record(self, record: Record) -> None:
        """Raises RuntimeError when a replay gives something else than the work itself."""
        work = self.work
        replay = record(work)
        want = torch.nan_to_num(work().float())
        got = torch.nan_to_num(replay().float())
        if bool((want - got).abs().amax() > AGREEMENT * want.abs().amax()):
            raise RuntimeError(
                f"The captured step of {self.rows} rows differs from the step itself; "
                "--graphs off serves without capture."
            )
        self.work = replay
        self.draw.record(record)

    def run(self, batch: StepBatch, token_ids: Tensor, positions: Tensor) -> Tensor:
        count = batch.rows
        self.inputs[0, :count].copy_(token_ids)
        self.inputs[1, :count].copy_(positions)
        if count < self.rows:
            self.inputs[:, count:].zero_()
        self._program.bind(self._program.plan(batch), self.reserved)
        return self.work()[:count]


class GraphRunner:
    """A StepRunner. `record` None leaves the buckets' work uncaptured: the same buffers and the
    same code, op by op."""

    def __init__(
        self,
        program: StepProgram,
        record: Record | None,
        sizes: Sequence[int],
        device: torch.device,
        progress: LoadProgress | None = None,
    ) -> None:
        """Raises NotCaptured. The largest bucket is captured first, so that the others fit into
        the memory that it took."""
        unsafe = program.unsafe_kernels()
        if unsafe:
            raise NotCaptured(f"kernels that read on the host: {', '.join(unsafe)}")
        self._program = program
        self.buckets: list[Bucket] = []
        for count, rows in enumerate(sorted(sizes, reverse=True), 1):
            try:
                bucket = Bucket(program, rows, device)
            except KernelError as error:
                raise NotCaptured(str(error)) from None
            if record is not None:
                bucket.record(record)
                if progress is not None:
                    progress(count, len(sizes), "capturing decode steps")
            self.buckets.insert(0, bucket)

    def bucket_of(self, batch: StepBatch) -> Bucket | None:
        if len(batch.token_ids) != batch.rows:
            return None
        return next((bucket for bucket in self.buckets if bucket.rows >= batch.rows), None)

    def __call__(self, batch: StepBatch, token_ids: Tensor, positions: Tensor) -> Tensor:
        bucket = self.bucket_of(batch)
        if bucket is None:
            return self._program.run(batch, token_ids, positions)
        return bucket.run(batch, token_ids, positions)

    def draw(self, batch: StepBatch, hidden: Tensor) -> Tensor | None:
        """The tokens that the step's rows sample (R,), -1 for none allowed, valid until the next
        call; None where a row wants what is not recorded."""
        bucket = self.bucket_of(batch)
        plan = None if bucket is None else plan_draw(batch, bucket.rows)
        return None if bucket is None or plan is None else bucket.draw.run(plan, hidden)


def capture_by_rows(
    program: StepProgram,
    record: Record,
    max_rows: int,
    device: torch.device,
    how: str,
    progress: LoadProgress | None = None,
) -> tuple[GraphRunner, Decision]:
    """Raises NotCaptured. `how` names what records, for the decision."""
    sizes = bucket_sizes(max_rows)
    runner = GraphRunner(program, record, sizes, device, progress)
    because = (
        f"{how}: decode steps in buckets of {', '.join(map(str, sizes))} rows are replayed; "
        "steps with longer rows run op by op"
    )
    return runner, Decision("step", "captured", because)
