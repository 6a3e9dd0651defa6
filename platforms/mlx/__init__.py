"""Apple silicon through MLX. This version judges the machine but has no MLX executor yet."""

from __future__ import annotations

from ...common.errors import PlatformError
from ..interface import DeviceFacts, EngineSpec, Executor, Machine, Probe, Status, Support
from ..judgement import Lack, absent, describe, judge, of_vendor

NOT_YET = "this version of Sixfold has no MLX executor yet"
INSTEAD = "pip install 'sixfold[cpu]'  # until then the CPU platform serves on a Mac"


class MLXPlatform:
    name = "mlx"

    def probe(self, machine: Machine) -> Probe:
        devices = of_vendor(machine, "apple")
        found = describe(devices)
        found += [f"{n} {v}" for n, v in machine.packages.items() if n in ("mlx", "mlx-lm")]
        lacks = [Lack(NOT_YET, INSTEAD)] if devices else absent(machine, "Apple GPU", [])
        return judge(0, "", found, lacks, ())

    def supports(self, feature: str, facts: DeviceFacts) -> Support:
        return Support(Status.NO, NOT_YET)

    def executor(self, spec: EngineSpec, facts: DeviceFacts) -> Executor:
        raise PlatformError(f"The platform 'mlx' cannot serve: {NOT_YET}. {INSTEAD}")


PLATFORM = MLXPlatform()
