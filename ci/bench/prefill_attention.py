"""The native attention's rate in a prefill, as a share of torch's float32 matrix product.

    python ci/bench/prefill_attention.py [--kv-dtype float16] [--rounds 25]

One thread, SmolLM2-135M's heads, pages shuffled; a product of 1,024 x 1,024 before and after every
run. Prints the median share; the first run is compared with the numpy reference.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from support.kernel_checks import cpu_device

from sixfold.common.ops.attention import attention
from sixfold.common.ops.suite import group_of, spec_of, step_of
from sixfold.platforms.cpu.native_attention import NativeAttention
from sixfold.platforms.cpu.native_library import LEVELS, Team, missing
from sixfold.platforms.cpu.native_ops import Issuer
from sixfold.platforms.interface_kernels import Case, KernelTable
from sixfold.platforms.machine import observe
from sixfold.platforms.torch_runtime.pools import TorchKVPool

HEADS, KV_HEADS, DIM, PAGE, SIDE = 9, 3, 64, 16, 1024
SHAPES = ((512, 0), (512, 2048), (2048, 0))  # new tokens, context


def case_of(new: int, context: int) -> Case:
    rng = np.random.default_rng(0)
    pages = -(-(new + context) // PAGE)
    slots = (pages + 1) * PAGE

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    args = {
        "q": normal(new, HEADS, DIM),
        "k": normal(new, KV_HEADS, DIM),
        "v": normal(new, KV_HEADS, DIM),
        "keys": normal(slots, KV_HEADS, DIM),
        "values": normal(slots, KV_HEADS, DIM),
        "page_table": (1 + rng.permutation(pages)).reshape(1, -1).astype(np.int32),
        "query_start": np.array([0, new], np.int32),
        "context_lens": np.array([context], np.int32),
        "page_size": PAGE,
        "scale": DIM**-0.5,
        "window": 0,
        "soft_cap": 0.0,
        "sinks": None,
    }
    return Case(f"{new} after {context}", args)


def work_of(case: Case, level: str, kv_dtype: str) -> Callable[[], torch.Tensor]:
    backend = NativeAttention(Issuer(Team(1, level)))
    named = Case(case.name, {**case.args, "tree_mask": None})
    group, spec = group_of(named), spec_of(named, "float32", kv_dtype)
    pool = TorchKVPool(group, backend.layout(group, spec, 1), cpu_device(), KernelTable({}, ()))
    pool.data.zero_()
    q, k, v = (torch.from_numpy(case.args[name]) for name in "qkv")
    bound = backend.bind(backend.plan(step_of(named), group))
    return lambda: backend.run(bound, pool, 0, q, k, v, spec)


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kv-dtype", default="float16")
    parser.add_argument("--rounds", type=int, default=25)
    asked = parser.parse_args()
    if reason := missing():
        sys.exit(f"There are no native kernels: {reason}.")
    level = next(name for name, needs in LEVELS if needs <= observe().cpu_features)
    torch.set_num_threads(1)
    a, b = torch.randn(2, SIDE, SIDE)
    small = case_of(40, 0)
    got = work_of(small, level, asked.kv_dtype)().numpy()
    worst = float(np.abs(got - attention(**small.args)).max())
    print(f"{level}, one thread, keys and values in {asked.kv_dtype}; largest error {worst:.1e}")
    for shape in SHAPES:
        case = case_of(*shape)
        work = work_of(case, level, asked.kv_dtype)
        new, context = shape
        operations = 4 * HEADS * DIM * sum(context + i + 1 for i in range(new))
        shares = []
        for _ in range(asked.rounds):
            before, taken = seconds(lambda: a @ b), seconds(work)
            product = min(before, seconds(lambda: a @ b))
            shares.append(operations / taken / (2 * SIDE**3 / product))
        print(f"{case.name}: {statistics.median(shares):.2f} of the product's rate")


if __name__ == "__main__":
    main()
