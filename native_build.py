"""Which instruction-set levels the native CPU kernels are compiled for, and how. Read by setup.py
and by ci/native_selftest.py; the levels' names are those of platforms/cpu/native_library.py."""

from __future__ import annotations

import platform
from collections.abc import Iterable

COMMON_FLAGS = "-std=c++20 -O3 -fPIC -ffp-contract=fast -fno-math-errno -Wno-psabi -pthread".split()
_AVX2 = "-mavx2 -mfma -mf16c".split()
_AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c".split()
_X86 = {
    "portable": [],
    "avx2": _AVX2,
    "avxvnni": [*_AVX2, "-mavxvnni"],
    "avx512": _AVX512,
    "avx512vnni": [*_AVX512, "-mavx512vnni"],
    "amxint8": [*_AVX512, "-mavx512vnni", "-mamx-tile", "-mamx-int8"],
}
_ARM64 = {
    "portable": [],
    "neon": [],
    "neondot": ["-march=armv8.2-a+dotprod"],
    "neoni8mm": ["-march=armv8.2-a+dotprod+i8mm"],
}
LEVEL_FREE = ("affinity", "team", "amx_permission", "api")
"""Sources that are compiled once, for any CPU."""


def machine() -> str:
    return platform.machine().lower()


def levels_for(name: str) -> dict[str, list[str]]:
    """Level -> compiler flags for a machine, as `platform.machine()` names it."""
    if name in ("x86_64", "amd64"):
        return _X86
    return _ARM64 if name in ("aarch64", "arm64") else {"portable": []}


def defines_for(levels: Iterable[str]) -> list[tuple[str, str]]:
    """What tells api.cpp which levels there are."""
    return [(f"SIXFOLD_HAS_{level}", "1") for level in levels]
