"""What a Metal kernel is, and starting one through MLX.

A kernel's function is given its `Launcher`, so that the same function and source also run in the
emulator of the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.core as mx


@dataclass(frozen=True, slots=True)
class MetalSource:
    """The body of a kernel, as `mx.fast.metal_kernel` takes it."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    body: str
    header: str = ""
    contiguous: bool = True  # inputs of other strides are copied first


@dataclass(frozen=True, slots=True)
class Launch:
    """One start of a kernel. `threads` and `group` count threads, as in Metal's
    dispatchThreads; every threadgroup is whole."""

    inputs: Sequence[mx.array]
    template: Sequence[tuple[str, int | bool | mx.Dtype]]
    threads: tuple[int, int, int]
    group: int  # threads of a threadgroup, all along the first axis
    shapes: Sequence[tuple[int, ...]]
    dtypes: Sequence[mx.Dtype]


Launcher = Callable[[MetalSource, Launch], list[mx.array]]

SMALL = 8
"""MLX puts inputs of fewer elements into another address space, which is another signature."""


def launch(source: MetalSource, call: Launch) -> list[mx.array]:
    kernel = _kernel(source, _signature(call))
    return kernel(
        inputs=list(call.inputs),
        template=list(call.template),
        grid=call.threads,
        threadgroup=(call.group, 1, 1),
        output_shapes=list(call.shapes),
        output_dtypes=list(call.dtypes),
    )


def _signature(call: Launch) -> str:
    """MLX compiles a kernel again whenever a name comes with another signature, so every signature
    gets a name."""
    kinds = (
        f"{str(x.dtype).removeprefix('mlx.core.')}{x.ndim}{'s' if x.size < SMALL else 'l'}"
        for x in call.inputs
    )
    return "_".join(kinds)


@cache
def _kernel(source: MetalSource, signature: str) -> Any:
    return mx.fast.metal_kernel(
        name=f"sixfold_{source.name}_{signature}",
        input_names=list(source.inputs),
        output_names=list(source.outputs),
        source=source.body,
        header=source.header,
        ensure_row_contiguous=source.contiguous,
    )
