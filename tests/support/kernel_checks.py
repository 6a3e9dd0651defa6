"""How a kernel of a torch platform is run on a numpy case and compared with the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from sixfold.common.ops.registry import KernelRegistry
from sixfold.platforms.cpu.device import CpuDevice
from sixfold.platforms.cpu.kernels import register
from sixfold.platforms.cpu.packing import GROUP
from sixfold.platforms.interface import DeviceFacts
from sixfold.platforms.interface_kernels import Case, Kernel, Op, Problem, Tolerance
from sixfold.platforms.torch_runtime.dtypes import DTYPES
from sixfold.platforms.torch_runtime.kernels import register_generic

FLOAT32_ARGS = {("rope", "cos"), ("rope", "sin"), ("qk_norm_rope", "cos"), ("qk_norm_rope", "sin")}
"""Arguments that stay float32 whatever the dtype under test."""

FLOAT32_OPS = {"sample", "logprobs", "rope_angles"}
"""Ops whose inputs are float32 in every model."""

PAD = 64
SENTINEL = 1234.5


def cpu_facts(**changes: Any) -> DeviceFacts:
    known = {
        "kind": "cpu",
        "name": "test CPU",
        "arch": (),
        "memory_bytes": 8 << 30,
        "unified_memory": True,
        "lane_width": 16,
        "dtypes": frozenset({"float32"}),
        "fp8": "none",
        "graphs": "none",
        "libraries": {},
        "features": frozenset({"avx2", "avx512f"}),
        "cores": 1,
    }
    return DeviceFacts(**{**known, **changes})


def cpu_registry(**changes: Any) -> KernelRegistry:
    facts = cpu_facts(**changes)
    registry = KernelRegistry()
    device = CpuDevice(facts, threads=1)
    register_generic(registry, device)
    register(registry, device)
    return registry


def runs_here(kernel: Kernel, dtype: str) -> str | None:
    return kernel.requires(cpu_facts(), Problem(kernel.op, dtype))


def round_case(op: Op, case: Case, dtype: str) -> Case:
    """The case as the kernel will see it: float arrays rounded to the dtype."""
    if dtype == "float32" or op.name in FLOAT32_OPS:
        return case
    rounded = {
        name: to_torch(value, DTYPES[dtype]).float().numpy()
        if _is_float(value) and (op.name, name) not in FLOAT32_ARGS
        else value
        for name, value in case.args.items()
    }
    return Case(case.name, rounded)


def run_kernel(op: Op, fn: Callable[..., Any], case: Case, dtype: str) -> list[np.ndarray]:
    """Every float input lies inside a larger block of sentinels, checked afterwards: a kernel that
    writes outside the in-place arguments it was given is caught."""
    blocks = []
    args: dict[str, Any] = {}
    for name, value in case.args.items():
        if not isinstance(value, np.ndarray):
            args[name] = value
            continue
        wanted = torch.float32
        if _is_float(value) and op.name not in FLOAT32_OPS and (op.name, name) not in FLOAT32_ARGS:
            wanted = DTYPES[dtype]
        if _is_float(value):
            block = torch.full((value.size + 2 * PAD,), SENTINEL, dtype=wanted)
            inside = block[PAD : PAD + value.size].view(value.shape)
            inside.copy_(torch.from_numpy(value.copy()))
            blocks.append((name, block, inside.clone(), inside))
            args[name] = inside
        else:
            args[name] = to_torch(value, None)
    with torch.inference_mode():
        outcome = fn(**args)
    results = list(outcome) if isinstance(outcome, tuple) else [outcome]
    _check_inputs(op, blocks, results)
    return [r.float().numpy() if r.is_floating_point() else r.numpy() for r in results]


def _check_inputs(op: Op, blocks: list[Any], results: list[torch.Tensor]) -> None:
    changed_in_place = {"kv_write": {"keys", "values"}, "page_copy": {"pool"}}.get(op.name, set())
    for name, block, before, inside in blocks:
        edges = torch.cat((block[:PAD], block[len(block) - PAD :])).float()
        expected = torch.tensor(SENTINEL).to(block.dtype).float()
        if not bool((edges == expected).all()):
            raise AssertionError(f"{op.name}: wrote outside {name}")
        if name in changed_in_place:
            if not any(r.data_ptr() == inside.data_ptr() for r in results):
                raise AssertionError(f"{op.name}: {name} is to be changed in place")
        elif not torch.equal(torch.nan_to_num(before), torch.nan_to_num(inside)):
            raise AssertionError(f"{op.name}: changed its input {name}")


def compare(op: Op, case: Case, dtype: str, got: list[np.ndarray]) -> None:
    outcome = op.reference(**case.args)
    expected = list(outcome) if isinstance(outcome, tuple) else [outcome]
    if len(got) != len(expected):
        raise AssertionError(f"{op.name}: {len(got)} results, the reference has {len(expected)}")
    tolerance: Tolerance = op.tolerance[dtype]
    for have, want in zip(got, expected, strict=True):
        if have.shape != want.shape:
            raise AssertionError(f"{op.name} {case.name}: shape {have.shape}, not {want.shape}")
        np.testing.assert_allclose(
            have, want, rtol=tolerance.rtol, atol=tolerance.atol, err_msg=f"{op.name} {case.name}"
        )


def check(op: Op, fn: Callable[..., Any], dtype: str, seed: int = 0) -> int:
    """Run all cases of `op`; the number that ran. Raises AssertionError at the first mismatch."""
    count = 0
    for case in op.cases(np.random.default_rng(seed)):
        rounded = round_case(op, case, dtype)
        compare(op, rounded, dtype, run_kernel(op, fn, rounded, dtype))
        count += 1
    return count


def to_torch(value: np.ndarray, dtype: torch.dtype | None) -> torch.Tensor:
    if value.dtype == np.uint32:
        value = value.view(np.int32)
    tensor = torch.from_numpy(np.ascontiguousarray(value).copy())
    return tensor if dtype is None else tensor.to(dtype)


def rounded_to_bytes(x: torch.Tensor) -> torch.Tensor:
    """Activations as eight bits with a scale per 32, as the CPU's native `linear` rounds them."""
    rows, k = x.shape
    if not rows:
        return x
    groups = torch.nn.functional.pad(x, (0, -k % GROUP)).view(rows, -1, GROUP)
    most = groups.abs().amax(-1, keepdim=True)
    codes = (groups * torch.where(most > 0, 127 / most, 0.0)).round()
    return (codes * (most / 127)).view(rows, -1)[:, :k]


def _is_float(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind == "f"
