"""Build and run tests/native/selftest.cpp: with sanitizers for this machine's levels, and
cross-compiled for arm64 under qemu where a cross compiler and the emulator are installed.

    python ci/native_selftest.py [--sanitize address,undefined] [--arm64]

AVX-512 and AMX levels run with their instructions emulated where this CPU lacks them; what is
compiled and not run is named at the end. `--arm64` fails where the tools are missing (Debian's
g++-aarch64-linux-gnu and qemu-user).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NATIVE = ROOT / "platforms" / "cpu" / "native"
sys.path.insert(0, str(ROOT))

# Address checks as calls, and none of every pointer, which address checks cover: inlined into these
# unrolled kernels they take minutes to compile.
SANITIZED = (
    "-g1 -O1 -fno-sanitize-recover=all -fno-sanitize=null,object-size,pointer-overflow "
    "--param asan-instrumentation-with-call-threshold=0"
).split()

_EMULATIONS = {"avx512": "avx512_emulation.h", "amx": "amx_emulation.h"}


def _is_emulated(level: str) -> bool:
    return level.startswith(tuple(_EMULATIONS))


def _emulation(level: str) -> list[str]:
    """Flags of a level whose instructions are loops."""
    header = next(file for start, file in _EMULATIONS.items() if level.startswith(start))
    parts = [f"AVX512{part}" for part in "F BW DQ VL".split()]
    parts += {"avx512vnni": ["AVX512VNNI"], "amxint8": ["AVX512VNNI", "AMX_INT8"]}.get(level, [])
    path = ROOT / "tests" / "native" / header
    return [f'-DSIXFOLD_EMULATED="{path}"', *(f"-D__{part}__" for part in parts)]


def build(
    compiler: str, machine: str, flags: list[str], folder: Path, emulated: Sequence[str] = ()
) -> Path:
    from native_build import COMMON_FLAGS, LEVEL_FREE, defines_for, levels_for

    levels = {**levels_for(machine), **{name: _emulation(name) for name in emulated}}
    jobs = [(NATIVE / f"level_{name}.cpp", extra) for name, extra in levels.items()]
    # What the system would say of tiles that are loops does not matter.
    given = ["-DSIXFOLD_EMULATED"] if "amxint8" in emulated else []
    jobs += [(NATIVE / f"{name}.cpp", given) for name in LEVEL_FREE]
    jobs.append((ROOT / "tests" / "native" / "selftest.cpp", []))
    macros = [f"-D{name}={value}" for name, value in defines_for(levels)]

    def compile_one(job: tuple[Path, list[str]]) -> str:
        source, extra = job
        target = str(folder / f"{source.stem}.o")
        command = [compiler, *COMMON_FLAGS, *extra, *flags, *macros, f"-I{NATIVE}"]
        subprocess.run([*command, "-c", str(source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, jobs))
    program = folder / "selftest"
    subprocess.run([compiler, *flags, *objects, "-pthread", "-o", str(program)], check=True)
    return program


def here(sanitize: str) -> None:
    from native_build import levels_for, machine
    from sixfold.platforms.cpu.native_library import LEVELS
    from sixfold.platforms.machine import observe

    features = observe().cpu_features
    compiled = levels_for(machine())
    runs = [name for name, needs in LEVELS if name in compiled and needs <= features]
    flags = [f"-fsanitize={sanitize}", *SANITIZED] if sanitize else []
    emulated = [name for name in compiled if _is_emulated(name) and name not in runs]
    with tempfile.TemporaryDirectory() as folder:
        program = build("g++", machine(), flags, Path(folder), emulated)
        subprocess.run([str(program), *runs, *emulated], check=True)
    rest = [name for name in compiled if name not in (*runs, *emulated)]
    print(
        f"sanitizers: {sanitize or 'none'}; emulated: {' '.join(emulated) or 'none'}; "
        f"compiled and not run here: {' '.join(rest) or 'none'}"
    )


def arm64() -> None:
    from native_build import levels_for

    compiler = "aarch64-linux-gnu-g++"
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if shutil.which(compiler) is None or emulator is None:
        sys.exit("needs g++-aarch64-linux-gnu and qemu-user (Debian's names)")
    with tempfile.TemporaryDirectory() as folder:
        program = build(compiler, "aarch64", ["-static"], Path(folder))
        subprocess.run([emulator, "-cpu", "max", str(program), *levels_for("aarch64")], check=True)
    print("arm64: ran under qemu-user")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sanitize", default="address,undefined")
    parser.add_argument("--arm64", action="store_true", help="cross-compiled, under qemu")
    asked = parser.parse_args()
    if asked.arm64:
        arm64()
    else:
        here(asked.sanitize)


if __name__ == "__main__":
    main()
