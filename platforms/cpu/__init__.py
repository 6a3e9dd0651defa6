"""Any CPU, through torch. Always there; every other platform is preferred when it is usable."""

from __future__ import annotations

import os
import sys

from ..interface import DeviceFacts, EngineSpec, Executor, Machine, Probe, Status, Support
from ..interface_kernels import Suite
from ..judgement import RANK_CPU, SERVED, judge, torch_found, torch_lacks
from ..machine_source import Source
from ..machine_topology import topology, usable_cpus
from ..recorded_device import no_interpreter, present

FEATURES = frozenset(
    "avx2 f16c fma avx_vnni avx512f avx512bw avx512dq avx512vl avx512_vnni avx512_bf16 avx512_fp16 "
    "amx_tile amx_int8 amx_bf16 amx_fp16 asimd asimddp asimdhp i8mm bf16 sve sve2 sme sme2".split()
)
"""Vector features that kernels may ask for, by their names in /proc/cpuinfo."""

BF16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
FP16 = frozenset({"avx512_fp16", "amx_fp16", "asimdhp"})
INT8 = frozenset({"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"})
LANES = (("avx512f", 16), ("avx2", 8), ("sve", 8), ("asimd", 4))
"""fp32 lanes of the widest vector unit. SVE's width is not in the flags: 256 bit is assumed."""


def device_facts(machine: Machine) -> DeviceFacts:
    features = machine.cpu_features & FEATURES
    units = {"bfloat16": BF16, "float16": FP16, "int8": INT8}
    native = {name for name, flags in units.items() if features & flags}
    return DeviceFacts(
        kind="cpu",
        name=machine.cpu_name,
        arch=(),
        memory_bytes=machine.memory_bytes,
        unified_memory=True,
        lane_width=next((lanes for flag, lanes in LANES if flag in features), 1),
        dtypes=frozenset(native | {"float32"}),
        fp8="none",
        graphs="none",
        libraries={n: v for n, v in machine.packages.items() if n == "torch"},
        features=features,
        cores=machine.physical_cores,
    )


def vectors(features: frozenset[str]) -> str:
    """The few words that tell a reader what the CPU is good at."""
    names = {
        "avx2": "AVX2", "avx512f": "AVX-512", "avx512_vnni": "VNNI", "avx_vnni": "VNNI",
        "avx512_bf16": "bf16", "amx_int8": "AMX", "asimd": "NEON", "sve": "SVE", "i8mm": "i8mm",
        "bf16": "bf16", "sme": "SME",
    }  # fmt: skip
    return ", ".join(dict.fromkeys(label for flag, label in names.items() if flag in features))


def _let_waiting_threads_sleep() -> None:
    """Read when torch loads its OpenMP: threads that wait for its next loop by spinning would take
    the cores from the native kernels' threads."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


class CPUPlatform:
    name = "cpu"

    def probe(self, machine: Machine) -> Probe:
        facts = device_facts(machine)
        units = vectors(facts.features) or "no vector units known"
        cores = f"{facts.cores} core{'s' if facts.cores > 1 else ''}"
        found = [f"{machine.cpu_name}, {cores} ({units})", *torch_found(machine)]
        # On Linux the default index gives the much larger CUDA build, which also runs on a CPU.
        index = "--extra-index-url https://download.pytorch.org/whl/cpu"
        lacks = torch_lacks(machine, "", "cpu", index if machine.os == "linux" else "")
        return judge(RANK_CPU, f"torch runs on any CPU; {cores}, {units}", found, lacks, [facts])

    def supports(self, feature: str, facts: DeviceFacts) -> Support:
        if feature in SERVED:
            return Support(Status.YES, "tested on CPU")
        return Support(Status.NO, f"{feature} is not served by this version")

    def executor(self, spec: EngineSpec, facts: DeviceFacts) -> Executor:
        _let_waiting_threads_sleep()
        from ..torch_runtime.executor import TorchExecutor
        from .device import CpuDevice
        from .kernels import register

        # Other systems than Linux neither tell a topology nor hold threads to CPUs.
        seen = topology(Source(), usable_cpus()) if sys.platform == "linux" else None
        device = CpuDevice(facts, spec.threads, seen)
        return TorchExecutor(spec, device, lambda registry: register(registry, device))

    def conformance(self, facts: DeviceFacts | None, interpreted: bool = False) -> Suite:
        if interpreted:
            raise no_interpreter(self.name)
        _let_waiting_threads_sleep()
        from ..torch_runtime.conformance import device_suite
        from .device import CpuDevice
        from .kernels import register

        device = CpuDevice(present(facts, self.name))
        return device_suite(device, lambda registry: register(registry, device))


PLATFORM = CPUPlatform()
