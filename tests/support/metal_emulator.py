"""Runs the sources of Metal kernels on a CPU: compiled with g++ against
`tests/native/metal_emulation.h`, with the signature that `mx.fast.metal_kernel` would write.

Every launch runs three times, its threads taking turns in three orders, and must give the same
bits: what one thread reads before another has written it comes out differently.
"""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from sixfold.platforms.mlx.metal.launch import Launch, MetalSource

HEADER = Path(__file__).resolve().parents[1] / "native" / "metal_emulation.h"
TYPES = {
    "float32": "float",
    "float16": "float16_t",
    "bfloat16": "bfloat16_t",
    **{f"{sign}int{n}": f"{sign}int{n}_t" for sign in ("u", "") for n in (8, 16, 32, 64)},
}
RAW = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}
ATTRIBUTES = {
    "simdgroup_index_in_threadgroup": ("uint", "now->index / 32"),
    "thread_index_in_simdgroup": ("uint", "now->index % 32"),
    "thread_index_in_threadgroup": ("uint", "now->index"),
    "thread_position_in_grid": ("uint3", "now->position"),
    "thread_position_in_threadgroup": ("uint3", "now->index, 0, 0"),
    "threadgroup_position_in_grid": ("uint3", "position"),
    "threadgroups_per_grid": ("uint3", "groups"),
    "threads_per_threadgroup": ("uint3", "size"),
}
# Metal's language is C++14 without its library.
FLAGS = "-std=c++14 -pedantic -Wall -Werror -Wno-unused-variable -O1 -fPIC -shared".split()
PAD, SENTINEL = 64, 0xA5
ORDERS = 3


class MetalFault(RuntimeError):
    """A kernel did what it must not: the message says what."""


def needs_compiler() -> pytest.MarkDecorator:
    missing = shutil.which("g++") is None or sys.platform != "linux"
    return pytest.mark.skipif(missing, reason="the Metal emulator needs Linux and g++")


class Emulator:
    """`launch` is a Launcher. Compiled kernels are kept in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._compiled: dict[str, Any] = {}
        self.launches = 0

    def launch(self, source: MetalSource, call: Launch) -> list[mx.array]:
        mx.eval(list(call.inputs))
        inputs = [_memory(x, source.contiguous) for x in call.inputs]
        run = self._function(translation(source, call))
        results = [_run(run, inputs, call, order) for order in range(ORDERS)]
        for other in results[1:]:
            if any((a != b).any() for a, b in zip(results[0], other, strict=True)):
                raise MetalFault(f"{source.name}: the result depends on which thread runs first")
        self.launches += 1
        parts = zip(results[0], call.shapes, call.dtypes, strict=True)
        return [mx.array(raw).view(kind).reshape(shape) for raw, shape, kind in parts]

    def _function(self, code: str) -> Any:
        if code not in self._compiled:
            name = self._folder / hashlib.sha256(code.encode()).hexdigest()[:16]
            path = name.with_suffix(".cpp")
            path.write_text(code)
            command = ["g++", *FLAGS, f"-I{HEADER.parent}", str(path)]
            subprocess.run([*command, "-o", f"{name}.so"], check=True)
            self._compiled[code] = ctypes.CDLL(f"{name}.so").sixfold_run
        return self._compiled[code]


def translation(source: MetalSource, call: Launch) -> str:
    """The C++ file of one kernel. Scalars are references, arrays come with shape and strides when
    the body speaks of them, and so do the attributes of threads."""
    parameters, arguments = [], []
    for i, (name, x) in enumerate(zip(source.inputs, call.inputs, strict=True)):
        kind = TYPES[_name(x.dtype)]
        if x.ndim == 0:
            parameters.append(f"const {kind}& {name}")
            arguments.append(f"*static_cast<const {kind}*>(inputs[{i}])")
            continue
        parameters.append(f"const emulation::Input<{kind}> {name}")
        arguments.append(
            f'{{"{name}", static_cast<const {kind}*>(inputs[{i}]), input_sizes[{i}], 0}}'
        )
        for fact, words in (("shape", "const int*"), ("strides", "const int64_t*")):
            if f"{name}_{fact}" in source.body:
                parameters.append(f"{words} {name}_{fact}")
                arguments.append(f"{fact}[{i}]")
    for i, (name, dtype) in enumerate(zip(source.outputs, call.dtypes, strict=True)):
        kind = TYPES[_name(dtype)]
        parameters.append(f"const emulation::Output<{kind}> {name}")
        arguments.append(
            f'{{"{name}", static_cast<{kind}*>(outputs[{i}]), output_sizes[{i}], writers[{i}]}}'
        )
    for name, (kind, value) in ATTRIBUTES.items():
        if name in source.body:
            parameters.append(f"const {kind} {name}")
            arguments.append(kind + "{" + f"emulation::group.{value}" + "}")
    return TEMPLATE.format(
        header=source.header,
        constants="\n".join(_constant(name, value) for name, value in call.template),
        parameters=", ".join(parameters),
        body=source.body,
        arguments=",\n      ".join(arguments),
    )


TEMPLATE = """#include "metal_emulation.h"
namespace {{
using namespace metal;
void *const *inputs, *const *outputs;
const int64_t *input_sizes, *output_sizes;
const int* const* shape;
const int64_t* const* strides;
uint32_t* const* writers;
{constants}
{header}
void kernel({parameters}) {{
#line 1
{body}
}}
void body() {{
  kernel({arguments});
}}
}}
extern "C" bool sixfold_run(
    void** in, const int64_t* in_sizes, const int** in_shape, const int64_t** in_strides,
    void** out, const int64_t* out_sizes, uint32_t** out_writers, const uint32_t* threads,
    uint32_t size, int order, char* message) {{
  inputs = in, input_sizes = in_sizes, shape = in_shape, strides = in_strides;
  outputs = out, output_sizes = out_sizes, writers = out_writers;
  return emulation::run(body, threads, size, order, message);
}}
"""


def _constant(name: str, value: int | bool | mx.Dtype) -> str:
    if isinstance(value, mx.Dtype):
        return f"using {name} = {TYPES[_name(value)]};"
    kind = "bool" if isinstance(value, bool) else "int"
    return f"constexpr {kind} {name} = {int(value)};"


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def _memory(x: mx.array, contiguous: bool) -> np.ndarray:
    """The array's own memory where its strides may be what they are."""
    raw = np.asarray(memoryview(x.view(RAW[x.itemsize])) if x.ndim else np.array(x))
    return np.ascontiguousarray(raw) if contiguous else raw


def _run(run: Any, inputs: list[np.ndarray], call: Launch, order: int) -> list[np.ndarray]:
    """Bytes of every output."""
    counts = [int(np.prod(shape)) for shape in call.shapes]
    blocks = [
        np.full(2 * PAD + n * kind.size, SENTINEL, np.uint8)
        for n, kind in zip(counts, call.dtypes, strict=True)
    ]
    writers = [np.zeros(n, np.uint32) for n in counts]
    shapes = [np.array(x.shape, np.int32) for x in inputs]
    strides = [np.array(x.strides, np.int64) // x.itemsize for x in inputs]
    message = ctypes.create_string_buffer(240)
    good = run(
        _pointers(inputs),
        _longs([_extent(x) for x in inputs]),
        _pointers(shapes),
        _pointers(strides),
        _pointers([block[PAD:] for block in blocks]),
        _longs(counts),
        _pointers(writers),
        (ctypes.c_uint32 * 3)(*call.threads),
        ctypes.c_uint32(call.group),
        ctypes.c_int(order),
        message,
    )
    if not good & 1:
        raise MetalFault(message.value.decode())
    for block, written in zip(blocks, writers, strict=True):
        if (block[:PAD] != SENTINEL).any() or (block[-PAD:] != SENTINEL).any():
            raise MetalFault("wrote outside an output")
        if not written.all():
            raise MetalFault(f"{int((written == 0).sum())} elements of an output were not written")
    return [block[PAD:-PAD] for block in blocks]


def _extent(x: np.ndarray) -> int:
    """Elements from the first to the last."""
    steps = [(n - 1) * s for n, s in zip(x.shape, x.strides, strict=True)]
    return 1 + sum(steps) // x.itemsize if x.size else 0


def _pointers(arrays: list[np.ndarray]) -> Any:
    return (ctypes.c_void_p * len(arrays))(*(a.ctypes.data for a in arrays))


def _longs(values: list[int]) -> Any:
    return (ctypes.c_int64 * len(values))(*values)
