"""A toy platform that does as a folder says: `hold` in it delays loading, `fail` breaks loading,
`break` breaks the next step. Installed for subprocesses by `conftest.py`."""

from __future__ import annotations

import os
import time
from pathlib import Path

from toy_platform import ToyExecutor, ToyPlatform

from sixfold.common.errors import OutOfMemory
from sixfold.platforms import interface as hw
from sixfold.platforms.interface_step import StepResult

FOLDER = Path(__file__).parent / "faults"


class FaultyPlatform(ToyPlatform):
    name = "faulty"

    def probe(self, machine: hw.Machine) -> hw.Probe:
        probe = super().probe(machine)
        return hw.Probe(True, 0, probe.reason, probe.found, devices=probe.devices)

    def executor(self, spec: hw.EngineSpec, facts: hw.DeviceFacts) -> hw.Executor:
        return FaultyExecutor(spec, facts)


class FaultyExecutor(ToyExecutor):
    def load(self, progress: hw.LoadProgress | None = None) -> hw.ExecutorInfo:
        if progress:
            progress(1_000_000, 4_000_000)
        while (FOLDER / "hold").exists():
            time.sleep(0.01)
        if (FOLDER / "fail").exists():
            raise OutOfMemory("The toy needs 4 bytes and there are 3. Use a smaller toy.")
        if (FOLDER / "crash").exists():
            os.abort()
        return super().load(progress)

    def collect(self) -> StepResult:
        if (FOLDER / "break").exists():
            raise RuntimeError("the toy broke")
        return super().collect()
