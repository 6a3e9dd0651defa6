"""Apple silicon through MLX and mlx-lm's own models; no torch.

MLX also has a CPU backend, on which everything but Metal kernels runs on Linux: usable there when
it is named, never picked.
"""

from __future__ import annotations

from ..interface import DeviceFacts, EngineSpec, Executor, Machine, Probe, Status, Support
from ..interface_kernels import Suite
from ..judgement import (
    RANK_ACCELERATOR,
    RANK_BY_NAME,
    SERVED,
    Lack,
    absent,
    describe,
    judge,
    numbers,
    of_vendor,
)
from ..recorded_device import no_interpreter, present

OLDEST_MLX = (0, 31, 2)
OLDEST_MLX_LM = (0, 31)
OLDEST_MACOS = (14, 0)
UNSEEN = "tested on MLX's CPU backend, not yet seen on an Apple GPU"


def device_facts(machine: Machine) -> DeviceFacts:
    devices = of_vendor(machine, "apple")
    gpu = bool(devices)
    return DeviceFacts(
        kind="mlx",
        name=devices[0].name if gpu else machine.cpu_name,
        arch=(),
        memory_bytes=machine.memory_bytes,
        unified_memory=True,
        lane_width=32 if gpu else 1,
        dtypes=frozenset({"float32", "float16", "bfloat16"} if gpu else {"float32"}),
        fp8="none",
        graphs="traced",
        libraries={n: v for n, v in machine.packages.items() if n in ("mlx", "mlx-lm")},
        features=frozenset({"metal"} if gpu else ()),
        cores=machine.physical_cores,
    )


def what_fits(memory: int) -> str:
    """What the GPU's recommended working set leaves room for, before anything is initialised: about
    two thirds of the memory, three quarters above 36 GiB."""
    room = memory * (3 / 4 if memory > 36 << 30 else 2 / 3)
    models = 0.8 * room / 1e9  # the rest is for the cache
    sizes = f"{models / 0.57:.0f} billion parameters in 4 bits, {models / 2:.0f} in 16"
    return f"about {room / 2**30:.1f} GiB for weights and cache: models of up to {sizes}"


def _lacks(machine: Machine) -> list[Lack]:
    install = "pip install 'sixfold[mlx]'"
    lacks = []
    for package, oldest in (("mlx", OLDEST_MLX), ("mlx-lm", OLDEST_MLX_LM)):
        version = machine.packages.get(package)
        if version is None:
            lacks.append(Lack(f"{package} is not installed", install))
        elif numbers(version) < oldest:
            wanted = ".".join(map(str, oldest))
            upgrade = f"pip install --upgrade {package}"
            lacks.append(Lack(f"{package} {version} is older than {wanted}", upgrade))
    if machine.os == "darwin" and numbers(machine.os_version) < OLDEST_MACOS:
        wanted = ".".join(map(str, OLDEST_MACOS))
        update = f"update macOS to {OLDEST_MACOS[0]} or newer"
        lacks.append(Lack(f"macOS {machine.os_version} is older than {wanted}", update))
    return lacks


class MLXPlatform:
    name = "mlx"

    def probe(self, machine: Machine) -> Probe:
        devices = of_vendor(machine, "apple")
        found = describe(devices)
        found += [f"{n} {v}" for n, v in machine.packages.items() if n in ("mlx", "mlx-lm")]
        if devices:
            found.append(what_fits(machine.memory_bytes))
            reason = f"MLX on {devices[0].name}"
            return judge(RANK_ACCELERATOR, reason, found, _lacks(machine), [device_facts(machine)])
        if "mlx" not in machine.packages:
            return judge(0, "", found, absent(machine, "Apple GPU", []), ())
        reason = "MLX's CPU backend, for tests: it is used when it is named, never picked"
        return judge(RANK_BY_NAME, reason, found, _lacks(machine), [device_facts(machine)])

    def supports(self, feature: str, facts: DeviceFacts) -> Support:
        if feature not in SERVED:
            return Support(Status.NO, f"{feature} is not served by this version")
        if "metal" in facts.features:
            return Support(Status.UNVERIFIED, UNSEEN)
        return Support(Status.YES, "tested on MLX's CPU backend")

    def executor(self, spec: EngineSpec, facts: DeviceFacts) -> Executor:
        import platform

        from .executor import MLXExecutor

        return MLXExecutor(spec, facts, platform.mac_ver()[0])

    def conformance(self, facts: DeviceFacts | None, interpreted: bool = False) -> Suite:
        if interpreted:
            raise no_interpreter(self.name)
        from .suite import suite

        return suite(present(facts, self.name))


PLATFORM = MLXPlatform()
