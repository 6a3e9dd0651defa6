"""A device graph's rules on the CPU: what is recorded runs again on the same memory, and what a
device cannot record is refused where it is called.

Every torch operation of the recorded work is kept with the very tensors that it took. A replay runs
them in order and writes each result into the tensor that the recording gave out. Values are baked
in where a device would bake them in: every Python number, and every tensor made from host values,
of which a recording may have none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sixfold.platforms.interface import Decision, LoadProgress
from sixfold.platforms.torch_runtime.graph_runner import GraphRunner, bucket_sizes, capture_by_rows
from sixfold.platforms.torch_runtime.step_program import StepProgram

Work = Callable[[], Tensor]

Calls = list[tuple[Any, Any, Any, Any]]
"""Of each recorded operation: itself, what it took, and what it gave."""

READS = frozenset("cpu numpy tolist item __bool__ __int__ __float__ __index__ __array__".split())
"""Functions that bring a device value to the host."""
FROM_HOST = frozenset({"lift_fresh", "lift_fresh_copy"})
"""Operations that make a tensor from host values: a copy to the device, which a graph would repeat
from memory that is gone."""
SIZED_BY_VALUES = torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output


class CannotRecord(RuntimeError):
    """What the recorded work does that a graph cannot hold."""


class NoHostReads(TorchFunctionMode):
    """On the CPU `.cpu()` does nothing and is no operation: so it is met where it is called."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        targets = [*args[1:], *kwargs.values()]
        to_host = name == "to" and any(str(target) == "cpu" for target in targets)
        if name in READS or to_host:
            raise CannotRecord(f"the step reads a device value on the host: Tensor.{name}")
        return func(*args, **kwargs)


class Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Calls = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in FROM_HOST:
            raise CannotRecord("the step makes a device tensor from host values while recording")
        if name == "is_nonzero" or name == "_local_scalar_dense":
            raise CannotRecord(f"the step reads a device value on the host: {name}")
        if any(tag in func.tags for tag in SIZED_BY_VALUES) and not _by_integers(name, args):
            raise CannotRecord(f"the step has a tensor whose size depends on values: {name}")
        result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, result))
        return result


def _by_integers(name: str, args: Any) -> bool:
    """Indexing carries the tag for the sake of masks; by integers its size is known."""
    chosen = [i for i in tree_leaves(args[1:2]) if isinstance(i, Tensor)]
    return name in ("index", "_index") and all(i.dtype not in MASKS for i in chosen)


MASKS = (torch.bool, torch.uint8)


def run_again(calls: Calls) -> None:
    """In order; each result goes into the tensor that the recording gave out."""
    for func, args, kwargs, recorded in calls:
        taken = {address(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        again = func(*args, **kwargs)
        for old, new in zip(tree_leaves(recorded), tree_leaves(again), strict=True):
            # A result on memory that the operation took is a view, or was changed in place.
            if isinstance(old, Tensor) and address(old) not in taken:
                old.copy_(new)


def poison_results(calls: Calls) -> int:
    """Fill everything that the operations gave out, so that a replay which leaves any of it as it
    was shows. The number of tensors filled."""
    count = 0
    for _, args, kwargs, recorded in calls:
        taken = {address(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(recorded):
            if isinstance(tensor, Tensor) and address(tensor) not in taken:
                poison(tensor)
                count += 1
    return count


class Recording:
    """The recorded operations; calling it replays them."""

    def __init__(self, work: Work) -> None:
        tape = Tape()
        with NoHostReads(), tape:
            self.result = work()
        self.calls = tape.calls

    def __call__(self) -> Tensor:
        run_again(self.calls)
        return self.result

    def poison(self) -> int:
        return poison_results(self.calls)


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def poison(tensor: Tensor) -> None:
    if tensor.is_floating_point():
        tensor.fill_(torch.nan)
    else:
        tensor.fill_(1 if tensor.dtype == torch.bool else 113)


class StandInGraphs:
    """`Graphs` of a device that records. `captures` False: the buckets' code, uncaptured."""

    def __init__(self, captures: bool = True, device: str = "cpu") -> None:
        self._captures = captures
        self._device = torch.device(device)
        self.recordings: list[Recording] = []
        self.runner: GraphRunner | None = None

    def capture(
        self,
        program: StepProgram,
        max_rows: int,
        max_tokens: int,
        progress: LoadProgress | None,
    ) -> tuple[GraphRunner, Decision]:
        if not self._captures:
            self.runner = GraphRunner(program, None, bucket_sizes(max_rows), self._device)
            return self.runner, Decision("step", "in buckets", "what a capture would hold")
        self.runner, decision = capture_by_rows(
            program, self.record, max_rows, self._device, "a stand-in", progress
        )
        return self.runner, decision

    def record(self, work: Work) -> Work:
        recording = Recording(work)
        self.recordings.append(recording)
        return recording

    @torch.inference_mode()
    def poison(self) -> None:
        """Everything that stays between steps in the buckets, as another tenant would leave it."""
        for recording in self.recordings:
            recording.poison()
        for bucket in self.runner.buckets if self.runner else ():
            draw = [bucket.draw.hidden, bucket.draw.floats, bucket.draw.ints]
            for tensor in [bucket.inputs, *draw, *tensors_of(bucket.reserved)]:
                poison(tensor)


def tensors_of(values: Any) -> list[Tensor]:
    """Tensors in lists, tuples, dictionaries and objects."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        return [tensor for value in values.values() for tensor in tensors_of(value)]
    if isinstance(values, list | tuple):
        return [tensor for value in values for tensor in tensors_of(value)]
    fields = getattr(values, "__dict__", None) or {
        name: getattr(values, name) for name in getattr(values, "__slots__", ())
    }
    return tensors_of(dict(fields))
