"""A mixture-of-experts layer with random weights: time of a decode step and of a prompt, by kernel.

    python ci/bench/moe_layer.py [--width 1024] [--inner 512] [--experts 64] [--top-k 8]

Providers and forms of weight take turns, so that a busy machine slows all of them. Without the
router's product.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from sixfold.platforms.cpu.device import CpuDevice
from sixfold.platforms.cpu.kernels import pack_experts
from sixfold.platforms.cpu.native_ops import NativeOps
from sixfold.platforms.interface_kernels import Problem
from sixfold.platforms.machine import observe
from sixfold.platforms.select import platforms
from sixfold.platforms.torch_runtime.kernels import moe

ROUNDS = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, size in (("width", 1024), ("inner", 512), ("experts", 64), ("top-k", 8)):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 512])
    asked = parser.parse_args()
    width, inner, experts = asked.width, asked.inner, asked.experts
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the platform does
    device = CpuDevice(platforms()["cpu"].probe(observe()).devices[0])
    device.attach()
    if device.issuer is None:
        raise SystemExit("there are no native kernels here")
    torch.manual_seed(0)
    gate_up = torch.randn(experts, 2 * inner, width) * width**-0.5
    down = torch.randn(experts, width, inner) * inner**-0.5
    ops = NativeOps(device.issuer)
    calls: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "generic float32": lambda x, r: moe(x, r, gate_up, down, asked.top_k, True)
    }
    for scheme in ("", "bfloat16", "int8", "int4"):
        stacks = []
        for stack, parts in ((gate_up, 2), (down, 1)):
            weight = stack.bfloat16() if scheme == "bfloat16" else stack
            problem = Problem("moe", "float32", {"parts": parts}, scheme)
            stacks.append(pack_experts(weight, problem))
        calls[f"native {scheme or 'float32'}"] = lambda x, r, s=tuple(stacks): ops.moe(  # type: ignore[misc]
            x, r, *s, asked.top_k, True
        )
    for rows in asked.rows:
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(ROUNDS):
            x, logits = torch.randn(rows, width), torch.randn(rows, experts)
            for name, call in calls.items():
                start = time.perf_counter()
                with torch.inference_mode():
                    call(x, logits)
                taken[name].append(time.perf_counter() - start)
        for name, times in taken.items():
            middle = statistics.median(times)
            print(f"{rows:4d} rows  {name:16s} {1e3 * middle:9.2f} ms  {rows / middle:9.0f} rows/s")


if __name__ == "__main__":
    main()
