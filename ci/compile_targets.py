"""Compiles Triton kernels for a GPU that is not there, by their own launches.

A driver that records takes the place of the machine's: the wrappers in `platforms/triton_kernels`
run on CPU tensors as they would on the device's, Triton specialises and compiles what they launch
for the target, and nothing is executed. What a binary needs is then read from the binary.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import GPUDriver

from sixfold.platforms.interface import DeviceFacts


@dataclass(frozen=True)
class Target:
    """`shared` is the most shared memory of one program, and `shared_core` that of one core;
    `warps` and `registers` are a CUDA core's, from the programming guide's table of
    capabilities; on AMD the compiler tells the occupancy itself."""

    name: str
    backend: str
    arch: Any
    facts_kind: str
    facts_arch: tuple[int, ...]
    lanes: int
    shared: int
    shared_core: int = 0
    warps: int = 64
    registers: int = 65536

    @property
    def facts(self) -> DeviceFacts:
        dtypes = frozenset({"float32", "float16", "bfloat16", "int8"})
        return DeviceFacts(
            self.facts_kind, self.name, self.facts_arch, 1 << 36, False, self.lanes, dtypes,
            "none", "stream", {},
        )  # fmt: skip


KIB = 1024
TARGETS = {
    target.name: target
    for target in (
        Target("gfx942", "hip", "gfx942", "rocm", (9, 4, 2), 64, 64 * KIB),
        Target("gfx950", "hip", "gfx950", "rocm", (9, 5, 0), 64, 160 * KIB),
        Target("gfx1100", "hip", "gfx1100", "rocm", (11, 0, 0), 32, 64 * KIB),
        Target("sm_80", "cuda", 80, "cuda", (8, 0), 32, 163 * KIB, 164 * KIB),
        Target("sm_90", "cuda", 90, "cuda", (9, 0), 32, 227 * KIB, 228 * KIB),
        Target("sm_100", "cuda", 100, "cuda", (10, 0), 32, 227 * KIB, 228 * KIB),
    )
}


class RecordingDriver(GPUDriver):
    """What Triton asks of a driver, answered for a target."""

    def __init__(self, target: Target) -> None:
        self._target = GPUTarget(target.backend, target.arch, target.lanes)
        self.get_device_capability = lambda *_: target.facts_arch[:2]
        self.get_current_stream = lambda _: 0
        self.get_current_device = lambda: 0
        self.set_current_device = lambda _: None
        properties = {"max_shared_mem": target.shared, "warpSize": target.lanes}
        self.utils = SimpleNamespace(
            get_device_properties=lambda _: properties,
            load_binary=lambda *_: (0, 0, 0, 0, 1024),
        )
        self.launcher_cls = lambda *_: lambda *_: None

    @staticmethod
    def is_active() -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("tables choose, nothing is tuned by trial")


@dataclass(frozen=True)
class Resources:
    """Of one program. `registers` per lane (on CDNA both kinds together). `spills` is what did not
    fit them and went to memory; `scalar_spills` (AMD) went to lanes of a vector. `occupancy` in
    warps: per SIMD as AMD's compiler reports it, per core as registers and shared memory allow on
    CUDA. `matrix`: instructions of the matrix units. `seconds` of processor time to compile."""

    kernel: str
    registers: int
    scalar_spills: int
    spills: int
    shared: int
    occupancy: int
    matrix: str
    seconds: float


@contextmanager
def compiling_for(target: Target) -> Iterator[None]:
    """While this is open, launches compile for `target` and nothing is cached on disk."""
    before = triton.knobs.cache.dir
    triton.compiler.compiler.max_shared_mem.cache_clear()  # it is of the target before
    triton.runtime.driver.set_active(RecordingDriver(target))
    with tempfile.TemporaryDirectory() as folder:
        triton.knobs.cache.dir = folder
        try:
            yield
        finally:
            triton.knobs.cache.dir = before
            triton.runtime.driver.set_active(None)  # asked for again, the machine's own is made


class Collector:
    """Kernels compiled since the last look, with the time each took."""

    def __init__(self) -> None:
        self.compiled: list[tuple[Any, float]] = []

    def __enter__(self) -> Collector:
        jit = triton.runtime.jit.JITFunction
        original = self._original = jit._do_compile

        def timed(function: Any, *args: Any) -> Any:
            began = time.process_time()
            kernel = original(function, *args)
            self.compiled.append((kernel, time.process_time() - began))
            return kernel

        jit._do_compile = timed
        return self

    def __exit__(self, *_: object) -> None:
        triton.runtime.jit.JITFunction._do_compile = self._original


def compile_work(target: Target, work: dict[str, Callable[[], object]]) -> Iterator[Resources]:
    """Runs every piece of work and reads what it made Triton compile. The kernels' own caches are
    emptied first: they hold what the target before compiled."""
    for function in _functions():
        function.device_caches.clear()
    with compiling_for(target), Collector() as collector:
        for name, launch in work.items():
            collector.compiled.clear()
            launch()
            for kernel, seconds in collector.compiled:
                yield read(target, f"{kernel.name} ({name})", kernel, seconds)


def _functions() -> list[Any]:
    from importlib import import_module

    package = Path(import_module("sixfold.platforms.triton_kernels").__file__ or "").parent
    modules = [import_module(f"sixfold.platforms.triton_kernels.{path.stem}")
               for path in package.glob("*.py") if "@triton.jit" in path.read_text()]  # fmt: skip
    jit = triton.runtime.jit.JITFunction
    return [value for m in modules for value in vars(m).values() if isinstance(value, jit)]


def read(target: Target, name: str, kernel: Any, seconds: float) -> Resources:
    reader = _read_amdgcn if target.backend == "hip" else _read_cubin
    return reader(target, name, kernel, round(seconds, 2))


def _read_amdgcn(target: Target, name: str, kernel: Any, seconds: float) -> Resources:
    text = kernel.asm["amdgcn"]

    def number(pattern: str) -> int:
        found = re.search(pattern + r"\s*:?\s*(\d+)", text)
        if found is None:
            raise ValueError(f"{name}: the listing of {target.name} has no {pattern}")
        return int(found[1])

    return Resources(
        name,
        number(r"; TotalNumVgprs" if "; TotalNumVgprs" in text else r"; NumVgprs"),
        number(r"\.sgpr_spill_count"),
        max(number(r"\.vgpr_spill_count"), number(r"\.private_segment_fixed_size")),
        kernel.metadata.shared,
        number(r"; Occupancy"),
        _instructions(text, r"\bv_w?mfma_\w+|\bv_wmma_\w+"),
        seconds,
    )


def _read_cubin(target: Target, name: str, kernel: Any, seconds: float) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        said = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    if len(usage) != 3:
        raise ValueError(f"{name}: cuobjdump said nothing of registers: {said!r}")
    shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
    by_registers = target.registers // (-(-usage["REG"] // 8) * 8 * 32 * warps)
    by_shared = target.shared_core // (shared + KIB) if shared else target.warps // warps
    occupancy = min(by_registers, by_shared, target.warps // warps) * warps
    matrix = _instructions(kernel.asm["ptx"], r"\b(?:wgmma\.mma_async|mma|tcgen05\.mma)\.[\w.:]+")
    return Resources(
        name, usage["REG"], 0, usage["STACK"] + usage["LOCAL"], shared, occupancy, matrix, seconds
    )


def _instructions(text: str, pattern: str) -> str:
    return " ".join(sorted(set(re.findall(pattern, text))))
