"""A process of its own that interprets a small Triton kernel through the suite, right and wrong,
and prints what the suite says as JSON."""

from __future__ import annotations

import json
from typing import Any

import torch

from sixfold.common.ops import OPS
from sixfold.common.ops.conformance import run_suite
from sixfold.common.ops.registry import KernelRegistry
from sixfold.platforms.cuda import RECORDED, device_facts
from sixfold.platforms.interface import DeviceFacts
from sixfold.platforms.interface_kernels import Kernel, Problem
from sixfold.platforms.recorded_device import machine_with
from sixfold.platforms.torch_runtime.device import TorchDevice
from sixfold.platforms.torch_runtime.interpreted import interpreted_suite

BLOCK = 64


def launcher(missing: int) -> Any:
    """silu_mul in Triton that leaves out the last `missing` elements."""
    import triton
    import triton.language as tl

    @triton.jit
    def silu_mul_kernel(gate, up, out, count, BLOCK: tl.constexpr):  # noqa: N803
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = at < count
        g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + at, g / (1 + tl.exp(-g)) * u, mask=inside)

    def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(gate)
        count = max(0, gate.numel() - missing)
        if count:
            silu_mul_kernel[(triton.cdiv(count, BLOCK),)](gate, up, out, count, BLOCK)
        return out

    return silu_mul


def requires(facts: DeviceFacts, problem: Problem) -> str | None:
    return None if facts.arch >= (8, 0) else "needs sm_80"


def said(missing: int) -> dict[str, Any]:
    def register(registry: KernelRegistry, device: TorchDevice) -> None:
        registry.add(Kernel("silu_mul", "triton", requires, launcher(missing), 10))

    suite = interpreted_suite(device_facts(RECORDED, machine_with(RECORDED)), register)
    found = run_suite(suite, {"silu_mul": OPS["silu_mul"]})
    verdicts = {v.provider: {"status": v.status, "unverified": v.unverified} for v in found}
    dtypes = {v.provider: list(v.errors) for v in found}
    return {"device": suite.device, "evidence": suite.evidence, **verdicts, "dtypes": dtypes}


if __name__ == "__main__":
    print(json.dumps([said(0), said(1)]))
