"""What fusing saves: the table of docs/fused-kernels.md, counted and not estimated.

    TRITON_INTERPRET=1 python ci/fused_table.py [--write]

For one case of each op's contract, shaped like a decode step: how many operations torch runs in the
generic kernel (each at least one launch on a GPU) and how many kernels the Triton one launches; the
bytes that these load and store, beside the distinct bytes that they load of the arguments and store
into the results, which no kernel can avoid; the largest difference to the numpy reference over the
cases that fit the time. Registers and vector spills are those of `ci/kernel_resources.json`.
Nothing was timed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sixfold.common.ops import OPS
from sixfold.common.ops.conformance import check_op, is_float
from sixfold.common.ops.registry import KernelRegistry
from sixfold.common.ops.suite import kernel_subject
from sixfold.platforms import rocm
from sixfold.platforms.interface_kernels import Case
from sixfold.platforms.recorded_device import machine_with
from sixfold.platforms.torch_runtime.conformance import TorchRunner
from sixfold.platforms.torch_runtime.interpreted import HostedDevice
from sixfold.platforms.torch_runtime.kernels import GENERIC
from sixfold.platforms.triton_kernels.register import register_triton

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "fused-kernels.md"
RESOURCES = ROOT / "ci" / "kernel_resources.json"
TARGETS = ("gfx942", "gfx950", "gfx1100")

SHAPES = {
    "gated_delta": ("decode", "gated_delta decode"),
    "conv1d_update": ("decode", "conv1d_update decode"),
    "latent_attention": ("decode_unlike_lengths", "latent_attention decode"),
    "merge_state": ("wide", "merge_state"),
    "mhc_pre": ("published_width", "mhc_pre"),
    "mhc_post": ("published_width", "mhc_post"),
    "mhc_post_pre": ("published_width", "mhc_post_pre few"),
    "mhc_head": ("published_width", "mhc_head"),
    "compress_norm_rope_store": ("decode", "compress 4, decode"),
    "index_topk": ("decode", "index_topk"),
    "inverse_rope_quant": ("published_head_ocp_power", "inverse_rope_quant ocp"),
    "qk_norm_rope_quant": ("published_head_ocp_power", "qk_norm_rope_quant ocp"),
    "compressed_attention": ("decode_selected", "compressed_attention selected, decode"),
}
"""Op -> the case that is counted, and its work in the table of resources."""

HEAD = """# Fused Triton kernels: what each saves

`TRITON_INTERPRET=1 python ci/fused_table.py --write` made this page, on a machine without a GPU. One case per op, shaped like a decode step. *Launches*: operations that torch
runs in the generic kernel (each at least one launch), and kernels that the Triton one launches. *Bytes*: what the kernels load and store, masked lanes left out, times over the
distinct bytes that they load of the arguments and store into the results (the floor); what is read again mostly comes from a cache, and partial results are beyond the floor. *Error*: largest absolute
difference to the numpy reference in float32, **interpreted**, over the cases that `tests/support/interpreted_cases.py` names. *Registers* and vector spills of each kernel: **compiled**
for sizes of real models ([table](kernel-resources.md)). **Nothing here ran on a GPU, and nothing was timed.**
"""  # noqa: E501
COLUMNS = (
    "op",
    "case",
    "launches",
    "bytes / floor",
    "error",
    *(f"{t}: registers" for t in TARGETS),
)


class Counted(TorchDispatchMode):
    """Counts operations that compute or copy; views and allocations are free."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returns = func._schema.returns
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        self.count += not view and "empty" not in func.__name__
        return func(*args, **(kwargs or {}))


Accesses = list[tuple[Any, int]]
"""(addresses of elements, bytes of an element)."""


@dataclass
class Traffic:
    """What kernels loaded and stored."""

    launches: int = 0
    loads: Accesses = field(default_factory=list)
    stores: Accesses = field(default_factory=list)

    def moved(self) -> int:
        return sum(len(at) * width for at, width in self.loads + self.stores)

    def floor(self, tensors: list[torch.Tensor]) -> int:
        """Distinct bytes loaded and distinct bytes stored, of those in these tensors' memory."""
        return sum(self._distinct(part, tensors) for part in (self.loads, self.stores))

    def _distinct(self, accesses: Accesses, tensors: list[torch.Tensor]) -> int:
        every = [at[:, None] + np.arange(width) for at, width in accesses]
        touched = np.unique(np.concatenate([at.reshape(-1) for at in every]))
        inside = np.zeros(len(touched), bool)
        for tensor in tensors:
            storage = tensor.untyped_storage()
            first = storage.data_ptr()
            inside |= (touched >= first) & (touched < first + storage.nbytes())
        return int(inside.sum())


def _access(pointers: Any, mask: Any) -> tuple[Any, int]:
    data = np.asarray(pointers.data)[np.asarray(mask.data, bool)]
    width = int(pointers.get_element_ty().primitive_bitwidth) // 8
    return data.astype(np.int64).reshape(-1), width


@contextmanager
def watching() -> Iterator[Traffic]:
    """Of what Triton's interpreter runs while this is open."""
    from triton.runtime import interpreter

    traffic, builder = Traffic(), interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    run = interpreter.InterpretedFunction.run

    def loading(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        traffic.loads.append(_access(pointers, mask))
        return load(self, pointers, mask, *rest)

    def storing(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        traffic.stores.append(_access(pointers, mask))
        return store(self, pointers, value, mask, *rest)

    def running(self: Any, *args: Any, **named: Any) -> Any:
        traffic.launches += 1
        return run(self, *args, **named)

    builder.create_masked_load, builder.create_masked_store = loading, storing
    interpreter.InterpretedFunction.run = running
    try:
        yield traffic
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
        interpreter.InterpretedFunction.run = run


def tensors(case: Case) -> dict[str, Any]:
    return {
        name: torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value
        for name, value in case.args.items()
    }


def results(outcome: Any) -> list[torch.Tensor]:
    return list(outcome) if isinstance(outcome, tuple) else [outcome]


def row(op: str, registry: KernelRegistry, device: HostedDevice, few: tuple[str, ...]) -> list[str]:
    case_name, work = SHAPES[op]
    contract = OPS[op]
    kernel = next(k for k in registry.kernels() if k.op == op and k.provider == "triton")
    cases = list(contract.cases(np.random.default_rng(0)))
    case = next(case for case in cases if case.name == case_name)
    with torch.inference_mode():
        with Counted() as counted:
            GENERIC[op](**tensors(case))
        given = tensors(case)
        with watching() as traffic:
            made = results(kernel.fn(**given))
    memory = [x for x in (*given.values(), *made) if isinstance(x, torch.Tensor)]
    floor = traffic.floor(memory)
    chosen = replace(contract, cases=lambda rng: [c for c in cases if c.name in few or not few])
    subject = kernel_subject(contract, kernel, device.facts, TorchRunner(device))
    (verdict,) = check_op(chosen, [subject], dtypes=("float32",))
    if verdict.status != "pass":
        raise SystemExit(f"{op}: {verdict}")
    return [
        f"`{op}`",
        f"{case_name}, {sizes(case)}",
        f"{counted.count} → {traffic.launches}",
        f"{traffic.moved():,} / {floor:,}",
        f"{verdict.errors['float32']:.1e}",
        *(registers(target, work) for target in TARGETS),
    ]


def sizes(case: Case) -> str:
    first = next(value for value in case.args.values() if is_float(value))
    return " by ".join(map(str, first.shape))


def registers(target: str, work: str) -> str:
    """Of each kernel that the work compiles, "registers" or "registers (spills)"."""
    table = json.loads(RESOURCES.read_text())["targets"][target]
    found = [r for name, r in table.items() if name.split(" (", 1)[1].rsplit(")", 1)[0] == work]
    cells = [f"{r['registers']} ({r['spills']} spilled)" if r["spills"] else str(r["registers"])
             for r in found]  # fmt: skip
    return ", ".join(cells) or "refused"


def page(rows: list[list[str]]) -> str:
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    return HEAD + "\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"renew {PAGE.relative_to(ROOT)}")
    asked = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") != "1":
        print("Triton reads TRITON_INTERPRET when it starts: set it to 1.")
        return 1
    sys.path.insert(0, str(ROOT / "tests"))
    from support.interpreted_cases import FEW

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    device = HostedDevice(rocm.device_facts(rocm.RECORDED, machine_with(rocm.RECORDED)))
    registry = KernelRegistry()
    register_triton(registry, device)
    text = page([row(op, registry, device, FEW.get(op, ())) for op in SHAPES])
    print(text)
    if asked.write:
        PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
