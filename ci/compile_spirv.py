"""Compiles every Triton kernel for an Intel GPU that is not there, as far as SPIR-V.

    python ci/compile_spirv.py --write      renew docs/kernel-spirv.md; without it, print

Needs an environment of its own with torch and `pip install --no-deps triton-xpu==3.3.0b1`, which
is the module `triton` itself: the newest that the package index has, for a torch of its time. What
a driver makes of SPIR-V (registers, spills) is not known here, and nothing is run.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from compile_targets import Target
from compile_workload import work
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.backends.driver import GPUDriver

PAGE = Path(__file__).resolve().parent.parent / "docs" / "kernel-spirv.md"
SHARED = 128 * 1024
ARC_B580 = {
    "architecture": 0x05004000, "device_arch": "bmg", "dpas": True, "name": "Arc B580",
    "sub_group_sizes": [16, 32], "max_work_group_size": 1024, "max_num_sub_groups": 64,
    "has_subgroup_matrix_multiply_accumulate": True,
    "has_subgroup_matrix_multiply_accumulate_tensor_float32": True,
    "has_subgroup_2d_block_io": True, "has_bfloat16_conversions": True, "has_fp16": True,
    "has_fp64": False, "driver_version": "1.6", "local_mem_size": SHARED,
    "max_shared_mem": SHARED,
}  # fmt: skip
"""The answers of a driver that Triton asks for, as its own driver module lists them."""
TARGET = Target("bmg", "xpu", ARC_B580, "xpu", (20, 1), 16, SHARED)
WARP = 32

HEAD = """# Triton's kernels in SPIR-V

Compiled, not run: `python ci/compile_spirv.py --write` made this page with Triton {version} for an Arc B580, on a machine without a GPU. The same launches as in
[what the kernels need](kernel-resources.md). SPIR-V is what Intel's driver compiles further; registers, spills and whether the driver takes it are not known here.
The Triton that torch 2.13 brings for this target is newer and not on the package index.

{made} of {all} compile. *Lanes* are those of a subgroup.

| kernel | SPIR-V bytes | shared bytes | lanes | matrix units |
| --- | --- | --- | --- | --- |
"""  # noqa: E501


@dataclass(frozen=True)
class Made:
    kernel: str
    cells: tuple[object, ...]  # of the table, or the reason why there are none
    compiled: bool


class RecordedDriver(GPUDriver):
    """What Triton asks of a driver, answered for the target."""

    def __init__(self) -> None:
        self.get_device_capability = lambda *_: (0, 0)
        self.get_current_stream = lambda _: 0
        self.get_current_device = lambda: 0
        self.set_current_device = lambda _: None
        self.utils = SimpleNamespace(get_device_properties=lambda _: {"max_shared_mem": SHARED})

    @staticmethod
    def is_active() -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("xpu", ARC_B580, WARP)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("tables choose, nothing is tuned by trial")


class Compiler:
    """In the place of Triton's `compile`: keeps what came out, and gives a kernel that does
    nothing when it is launched."""

    def __init__(self) -> None:
        self.work, self.made = "", list[Made]()
        self._compile = triton.compiler.compile

    def __call__(self, source: Any, target: Any = None, options: Any = None) -> Any:
        name = f"{source.fn.__name__} ({self.work})"
        try:
            kernel = self._compile(source, target=target, options=options)
        except Exception as error:  # of any kind: a compiler's
            said = str(error).strip().splitlines() or [type(error).__name__]
            self.made.append(Made(name, (said[-1][:120],), False))
        else:
            facts, matrix = kernel.metadata, "matrix_mad" in str(kernel.asm["llir"])
            cells = len(kernel.asm["spv"]), facts.shared, facts.threads_per_warp, _word(matrix)
            self.made.append(Made(name, cells, True))
        return SimpleNamespace(
            launch_metadata=_nothing, run=_nothing, function=None, packed_metadata=None
        )


def _nothing(*given: object) -> None:
    """A launch."""


def _word(true: bool) -> str:
    return "yes" if true else ""


def compile_all() -> Iterator[Made]:
    intel = backends["intel"].compiler
    # Its helper, which asks the driver for the architecture, is built with SYCL's headers.
    known = SimpleNamespace(parse_device_arch=lambda _: ARC_B580["device_arch"])
    intel.__init__.__globals__["compile_module_from_src"] = lambda *_: known
    triton.runtime.driver.set_active(RecordedDriver())
    compiler = triton.compiler.compile = Compiler()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        for name, launch in work(TARGET).items():
            compiler.work, compiler.made = name, []
            launch()
            yield from compiler.made


def rows(made: list[Made]) -> str:
    lines = []
    for one in dict.fromkeys(made):
        cells = one.cells if one.compiled else (f"not compiled: {one.cells[0]}", "", "", "")
        lines.append(f"| {' | '.join(map(str, (one.kernel, *cells)))} |\n")
    return "".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="renew docs/kernel-spirv.md")
    asked = parser.parse_args()
    made = []
    for one in compile_all():
        made.append(one)
        print(one.kernel, *one.cells, sep="\t", flush=True)
    compiled = sum(one.compiled for one in made)
    print(f"{compiled} of {len(made)} compile")
    if asked.write:
        head = HEAD.format(version=triton.__version__, made=compiled, all=len(made))
        PAGE.write_text(head + rows(made))
    return 0 if made and compiled == len(made) else 1


if __name__ == "__main__":
    sys.exit(main())
