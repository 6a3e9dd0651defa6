"""Builds the native CPU kernels: every source once per instruction-set level, with that level's
flags. Without a working C++ compiler the package installs without them and says so when it runs."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NATIVE = Path("platforms/cpu/native")
MACHINE = platform.machine().lower()
X86 = MACHINE in ("x86_64", "amd64")
ARM64 = MACHINE in ("aarch64", "arm64")
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
LEVELS: dict[str, list[str]] = {"portable": []}
if X86:
    LEVELS |= {
        "avx2": _AVX2,
        "avxvnni": [*_AVX2, "-mavxvnni"],
        "avx512": _AVX512,
        "avx512vnni": [*_AVX512, "-mavx512vnni"],
    }
if ARM64:
    LEVELS |= {"neon": [], "neondot": ["-march=armv8.2-a+dotprod"]}
FLAGS = ["-std=c++20", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi", "-pthread"]
DEFINES = [("SIXFOLD_X86", "1")] if X86 else [("SIXFOLD_ARM64", "1")] if ARM64 else []


class BuildLevels(build_ext):
    def build_extension(self, ext: Extension) -> None:
        sources = [(f"level_{name}.cpp", flags) for name, flags in LEVELS.items()]
        sources += [("team.cpp", []), ("api.cpp", [])]
        objects = []
        for name, flags in sources:
            objects += self.compiler.compile(
                [str(NATIVE / name)],
                output_dir=self.build_temp,
                macros=DEFINES,
                include_dirs=[str(NATIVE)],
                extra_postargs=[*FLAGS, *flags],
                depends=ext.depends,
            )
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            extra_postargs=["-pthread"],
            target_lang="c++",
        )


extension = Extension(
    "sixfold.platforms.cpu._native",
    sources=[],
    depends=[str(path) for path in NATIVE.glob("*")],
    language="c++",
    optional=True,
)
# Windows' compiler knows neither these flags nor vector extensions.
setup(
    ext_modules=[] if sys.platform == "win32" else [extension],
    cmdclass={"build_ext": BuildLevels},
)
