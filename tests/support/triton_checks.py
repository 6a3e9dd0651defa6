"""The Triton kernels on CPU tensors: facts of a device that they are cut for, and modules of theirs
with a fault put into the source."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from support.kernel_checks import cpu_facts, verdict_of

from sixfold.common.ops.conformance import Verdict
from sixfold.common.ops.registry import KernelRegistry
from sixfold.platforms.cpu.device import CpuDevice
from sixfold.platforms.interface import DeviceFacts
from sixfold.platforms.interface_attention import AttentionSpec
from sixfold.platforms.interface_kernels import Op
from sixfold.platforms.triton_kernels import tuning
from sixfold.platforms.triton_kernels.register import register_triton
from sixfold.platforms.triton_kernels.tuning import Tile, Tuning

PACKAGE = "sixfold.platforms.triton_kernels"


def triton_facts(**changes: Any) -> DeviceFacts:
    known = {
        "kind": "cuda",
        "name": "test GPU",
        "arch": (9, 0),
        "lane_width": 32,
        "dtypes": frozenset({"float32", "float16", "bfloat16"}),
    }
    return cpu_facts(**{**known, **changes})


WARP_64 = triton_facts(kind="rocm", arch=(9, 4, 2), lane_width=64)


class InterpretedDevice(CpuDevice):
    """CPU tensors under the facts of another device; steps run op by op."""

    def __init__(self, facts: DeviceFacts | None = None) -> None:
        super().__init__(facts or triton_facts(), threads=1)

    @property
    def graphs(self) -> None:
        return None


def triton_registry(facts: DeviceFacts | None = None) -> KernelRegistry:
    registry = KernelRegistry()
    register_triton(registry, InterpretedDevice(facts))
    return registry


def verdict_on(op: Op, names: Collection[str], fn: Callable[..., Any], *dtypes: str) -> Verdict:
    """As `verdict_of`, of the cases named; of all when none is."""
    missing = set(names) - {case.name for case in op.cases(np.random.default_rng(0))}
    if missing:
        raise AssertionError(f"{op.title} has no cases {', '.join(sorted(missing))}")
    chosen = replace(
        op, cases=lambda rng: [c for c in op.cases(rng) if not names or c.name in names]
    )
    return verdict_of(chosen, fn, *dtypes)


def is_caught(op: Op, fn: Callable[..., Any], names: Collection[str] = ()) -> bool:
    """Whether some case of the contract, or of those named, fails; no case is run behind the first
    that does."""
    cases = [c for c in op.cases(np.random.default_rng(0)) if not names or c.name in names]
    return any(verdict_of(replace(op, cases=lambda _, c=c: [c]), fn).failed for c in cases)


def small_cut(facts: DeviceFacts | None = None) -> Tuning:
    """Blocks so small that short contexts have several of everything."""
    tile = Tile(block_m=16, block_n=16, warps=4, stages=1)
    row = tuning.choose(facts or triton_facts())
    wide = replace(tile, block_m=32)
    float32 = {"narrow_float32": tile, "wide_float32": wide}
    return replace(row, narrow=tile, wide=wide, **float32, splits=4, least_blocks=1)


def attention_backend(cut: Tuning | None = None, facts: DeviceFacts | None = None) -> Any:
    from sixfold.platforms.triton_kernels.attention import TritonAttention

    known = facts or triton_facts()

    class OnItsDevice(TritonAttention):
        """Whoever asks for the CPU means the device whose facts this has."""

        def accepts(self, spec: AttentionSpec, facts: DeviceFacts) -> tuple[str, ...]:
            return super().accepts(spec, known)

    backend = OnItsDevice(InterpretedDevice(known))
    if cut is not None:
        backend._tuning = cut
    return backend


def with_fault(module: str, old: str, new: str, folder: Path) -> ModuleType:
    """The module with the first `old` in its source replaced; of a name of its own."""
    source = Path(importlib.import_module(f"{PACKAGE}.{module}").__file__ or "").read_text()
    if old not in source:
        raise AssertionError(f"the fault is nowhere in {module}: {old!r}")
    path = folder / f"faulty_{module}.py"
    path.write_text(source.replace(old, new, 1))
    spec = importlib.util.spec_from_file_location(f"{PACKAGE}.faulty_{module}", path)
    if spec is None or spec.loader is None:
        raise AssertionError(f"{path} cannot be imported")
    made = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = made
    spec.loader.exec_module(made)
    return made
