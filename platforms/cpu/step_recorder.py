"""The model's step as a list of native instructions, recorded once and run without Python.

The model runs once on buffers of the largest step while `Issuer` writes instructions down instead
of running them. Rows are counted at run time, so one recording serves steps of every size. Python
lifetimes during the recording tell which buffers may share memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..interface import Decision, LoadProgress
from ..interface_step import StepBatch
from ..torch_runtime.step_program import NotCaptured, StepProgram, StepRunner
from .instruction_order import buffer_finder, order
from .native_library import Instruction
from .native_ops import Issuer, NotRecorded

Step = Callable[[Tensor, Tensor], Tensor]


class Arena:
    """Buffers that return when the last tensor on them is gone."""

    def __init__(self) -> None:
        self.blocks: list[Any] = []
        self._free: dict[int, list[Any]] = {}

    def allocate(self, rows: int, width: int) -> Tensor:
        size = rows * width
        free = self._free.setdefault(size, [])
        if not free:
            self.blocks.append(np.empty(size, np.float32))
            free.append(self.blocks[-1])
        block = free.pop()
        handed = block[:]
        weakref.finalize(handed, free.append, block).atexit = False
        return torch.from_numpy(handed).view(rows, width)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """(address, bytes) of every buffer."""
        return [(block.ctypes.data, block.nbytes) for block in self.blocks]

    @property
    def nbytes(self) -> int:
        return sum(block.nbytes for block in self.blocks)


class _OnlyViews(TorchDispatchMode):
    """Refuses every torch operation that does more than name memory anew: a recording would miss
    it."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch's compiler would be imported to be told to stay away: two seconds of start-up."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        named = _storages(result)
        if func._schema.is_mutable or not named or not named <= _storages((args, kwargs)):
            raise NotRecorded(f"the model calls torch's {func.overloadpacket.__name__}")
        return result


def _storages(values: Any) -> set[int]:
    leaves = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
    return {leaf.untyped_storage().data_ptr() for leaf in leaves}


class RecordedStep:
    """Runs like the step that it was recorded from. A result is valid until the next call."""

    def __init__(self, issuer: Issuer, step: Step, max_tokens: int) -> None:
        """Raises NotRecorded when the step does more than native instructions can."""
        self._team = issuer.team
        self._arena = Arena()
        self._tokens = torch.zeros(max_tokens, dtype=torch.int64)
        self._positions = torch.zeros(max_tokens, dtype=torch.int64)
        only_views: Any = _OnlyViews  # torch leaves it untyped
        with only_views(), issuer.recording(self._arena.allocate, max_tokens) as tape:
            self._hidden = step(self._tokens, self._positions)
        order(tape, buffer_finder(self._arena.spans))
        self.count = len(tape)
        self._instructions = (Instruction * self.count)(*tape)

    @property
    def buffer_bytes(self) -> int:
        return self._arena.nbytes

    def __call__(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        count = len(token_ids)
        self._tokens[:count].copy_(token_ids)
        self._positions[:count].copy_(positions)
        self._team.run(self._instructions, self.count, count)
        return self._hidden[:count]


class RecordedRunner:
    """A StepRunner: binds each step's plan to its one place and runs the recording."""

    def __init__(self, program: StepProgram, recorded: RecordedStep) -> None:
        self.program = program
        self.recorded = recorded

    def __call__(self, batch: StepBatch, token_ids: Tensor, positions: Tensor) -> Tensor:
        self.program.bind_caches(self.program.plan(batch))
        return self.recorded(token_ids, positions)


class StepRecorder:
    """The CPU's form of a graph. Its attention keeps a group's plan at a fixed address, whatever
    the size of the step."""

    def __init__(self, issuer: Issuer) -> None:
        self._issuer = issuer

    def capture(
        self,
        program: StepProgram,
        max_rows: int,
        max_tokens: int,
        progress: LoadProgress | None,
    ) -> tuple[StepRunner, Decision]:
        """Checked on two tokens that go to the null pages. Raises NotCaptured."""
        bound = program.bind(program.plan(program.rehearsal([2])))
        example = torch.zeros(2, dtype=torch.int64), torch.arange(2)

        def step(token_ids: Tensor, positions: Tensor) -> Tensor:
            return program.forward(token_ids, positions, bound)

        recorded = self.record(step, example, max_tokens)
        because = (
            f"{recorded.count} native instructions run without Python between them; "
            f"buffers of up to {recorded.buffer_bytes >> 20} MiB for {max_tokens} tokens"
        )
        return RecordedRunner(program, recorded), Decision("step", "recorded", because)

    def record(self, step: Step, example: tuple[Tensor, Tensor], max_tokens: int) -> RecordedStep:
        """`step` for up to `max_tokens` tokens, checked on `example`. Raises NotCaptured."""
        try:
            recorded = RecordedStep(self._issuer, step, max_tokens)
        except NotRecorded as error:
            raise NotCaptured(str(error)) from None
        want, got = step(*example).clone(), recorded(*example)
        if not torch.equal(want, got):
            raise RuntimeError("A recorded step differs from the step that it was recorded from.")
        return recorded
