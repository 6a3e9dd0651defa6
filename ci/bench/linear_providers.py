"""Which provider is fastest at a linear layer, by how its weights are kept and by rows: the figures
behind platforms/cpu/linear_preference.toml.

    OMP_WAIT_POLICY=PASSIVE python ci/bench/linear_providers.py [--rows 1,8] [--toml FILE]

(The engine sets that variable too.) Shapes are K x N. Providers take turns within every round, the
median counts, and each result is first compared with float64 on the weights as that provider keeps
them. With one thread, processor time is measured: other programs disturb it less. What torch here
lacks is named with the reason and left out.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own spelling)
from torch import Tensor

from sixfold.platforms.cpu import kernels, packing
from sixfold.platforms.cpu.native_library import Team, usable_levels
from sixfold.platforms.cpu.native_ops import Issuer, NativeOps
from sixfold.platforms.machine import observe

SHAPES = "576x1536,1536x576,1024x3072,3072x1024"
ROWS = "1,4,8,32,128,512"
FLOAT32, ROUNDED, BY_TENSOR = 2e-6, 2e-2, 5e-2
"""Largest relative error (norm of the difference by norm): of exact arithmetic, of activations
rounded by row or group, and with one scale for all activations."""
SPIN = 0.002
"""Seconds for which threads of the provider before may still wait by spinning."""


@dataclass(frozen=True)
class Contender:
    """`run(x)` multiplies x (rows, k) by weights whose values are `kept` (n, k)."""

    scheme: str
    provider: str
    run: Callable[[Tensor], Tensor]
    kept: Tensor
    error: float


def native(ops: NativeOps, scheme: str, weight: Tensor) -> Contender:
    forms: dict[str, Callable[[], packing.PackedWeight]] = {
        "float32": lambda: packing.pack_floats(weight),
        "bfloat16": lambda: packing.pack_floats(weight.bfloat16()),
        "float16": lambda: packing.pack_floats(weight.half()),
        "int8": lambda: packing.quantise_int8(weight),
        "int4": lambda: packing.quantise_int4(weight),
    }
    packed = forms[scheme]()
    error = ROUNDED if packed.quantised else FLOAT32
    # A view of its own makes every call round its activations, as a layer would.
    return Contender(
        scheme,
        "native",
        lambda x: ops.linear(x.view(x.shape), packed),
        packing.unpack(packed),
        error,
    )


def by_channel(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(n, k) -> signed bytes and a scale per output."""
    scale = weight.abs().amax(1) / 127
    return (weight / scale[:, None]).round().to(torch.int8), scale


def torch_bfloat16(weight: Tensor) -> Contender:
    kept = weight.bfloat16()
    return Contender(
        "bfloat16", "torch bf16", lambda x: F.linear(x.bfloat16(), kept).float(), kept, ROUNDED
    )


def torch_int8pack(weight: Tensor) -> Contender:
    q, scale = by_channel(weight)
    return Contender(
        "int8",
        "torch _weight_int8pack_mm",
        lambda x: torch._weight_int8pack_mm(x, q, scale),
        q * scale[:, None],
        ROUNDED,
    )


def torch_int_mm(weight: Tensor) -> Contender:
    q, scale = by_channel(weight)
    turned = q.t().contiguous()

    def run(x: Tensor) -> Tensor:
        steps = x.abs().amax(1, keepdim=True) / 127
        return torch._int_mm((x / steps).round().to(torch.int8), turned) * steps * scale

    return Contender("int8", "torch _int_mm", run, q * scale[:, None], ROUNDED)


def torch_dynamic(weight: Tensor) -> Contender:
    q = torch.quantize_per_tensor(weight, float(weight.abs().max()) / 127, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(q, None)
    return Contender(
        "int8",
        "torch quantized::linear_dynamic",
        lambda x: torch.ops.quantized.linear_dynamic(x, packed, True),
        q.dequantize(),
        BY_TENSOR,
    )


def contenders(ops: NativeOps, weight: Tensor) -> list[Callable[[], Contender]]:
    schemes = ("float32", "bfloat16", "float16", "int8", "int4")
    exact: dict[str, Callable[[Tensor], Tensor]] = {
        "generic": lambda x: F.linear(x, weight),
        "onednn": lambda x: kernels.linear(x, weight),
    }
    return [
        *(lambda s=s: native(ops, s, weight) for s in schemes),
        *(lambda n=n, f=f: Contender("float32", n, f, weight, FLOAT32) for n, f in exact.items()),
        *(lambda m=m: m(weight) for m in (torch_bfloat16, torch_int8pack)),
        *(lambda m=m: m(weight) for m in (torch_int_mm, torch_dynamic)),
    ]


def usable(make: Callable[[], Contender], x: Tensor, missing: set[str]) -> Contender | None:
    """None where torch cannot; a wrong result ends the program."""
    try:
        entry = make()
        got = entry.run(x)
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        missing.add(str(error).splitlines()[0][:120])
        return None
    want = x.double() @ entry.kept.double().T
    error = float((got.double() - want).norm() / want.norm())
    if not error <= entry.error:
        raise SystemExit(f"{entry.provider} {entry.scheme}: relative error {error:.2g}")
    return entry


def measure(
    entries: list[Contender], x: Tensor, seconds: float, clock: Callable[[], float]
) -> dict[tuple[str, str], float]:
    """(scheme, provider) -> median seconds a call; several calls in a turn where they are short."""
    times: dict[tuple[str, str], list[float]] = {(e.scheme, e.provider): [] for e in entries}
    calls = max(1, 64 // len(x))
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or min(map(len, times.values())) < 3:
        for entry in entries:
            time.sleep(SPIN)
            entry.run(x)
            start = clock()
            for _ in range(calls):
                entry.run(x)
            spent = (clock() - start) / calls
            times[entry.scheme, entry.provider].append(spent)
    return {key: statistics.median(values) for key, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", default=SHAPES, help="K x N, several by comma")
    parser.add_argument("--rows", default=ROWS)
    parser.add_argument("--seconds", type=float, default=3.0, help="per shape and row count")
    parser.add_argument("--threads", type=int, default=observe().physical_cores)
    parser.add_argument("--toml", type=Path, help="also write the figures to this file")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    machine = observe()
    level = usable_levels(machine.cpu_features)[0]
    ops = NativeOps(Issuer(Team(asked.threads, level)))
    threads = f"{asked.threads} threads, torch {torch.__version__}"
    print(f"{machine.cpu_name}, level {level}, {threads}\n")
    print("| K x N | rows | weights | provider | µs | GFLOP/s |\n|---|---|---|---|---|---|")
    clock = time.process_time if asked.threads == 1 else time.perf_counter
    missing: set[str] = set()
    found: list[str] = []
    for shape in asked.shapes.split(","):
        k, n = map(int, shape.split("x"))
        weight = torch.randn(n, k) * k**-0.5
        for rows in map(int, asked.rows.split(",")):
            x = torch.randn(rows, k)
            tried = [usable(make, x, missing) for make in contenders(ops, weight)]
            medians = measure([e for e in tried if e is not None], x, asked.seconds, clock)
            for (scheme, provider), spent in sorted(medians.items()):
                rate = 2 * rows * n * k / spent / 1e9
                name = f"{k} x {n} | {rows} | {scheme} | {provider}"
                print(f"| {name} | {spent * 1e6:.0f} | {rate:.1f} |", flush=True)
                found.append(
                    f'[[time]]\nk = {k}\nn = {n}\nrows = {rows}\nweights = "{scheme}"\n'
                    f'provider = "{provider}"\nmicroseconds = {spent * 1e6:.1f}\n'
                )
    for reason in sorted(missing):
        print(f"\nnot measured: {reason}")
    if asked.toml:
        head = f'cpu = "{machine.cpu_name}"\nlevel = "{level}"\nthreads = {asked.threads}\n'
        asked.toml.write_text(head + "\n" + "\n".join(found))


if __name__ == "__main__":
    main()
