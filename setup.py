"""Builds the native CPU kernels: every source once per instruction-set level, with that level's
flags. Without a working C++ compiler the package installs without them and says so when it runs."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent))  # build front ends do not
from native_build import COMMON_FLAGS, defines_for, levels_for, machine

NATIVE = Path("platforms/cpu/native")


class BuildLevels(build_ext):
    def build_extension(self, ext: Extension) -> None:
        sources = [(f"level_{name}.cpp", flags) for name, flags in levels_for(machine()).items()]
        sources += [("team.cpp", []), ("api.cpp", [])]

        def compiled(source: tuple[str, list[str]]) -> list[str]:
            name, flags = source
            return self.compiler.compile(
                [str(NATIVE / name)],
                output_dir=self.build_temp,
                macros=defines_for(machine()),
                include_dirs=[str(NATIVE)],
                extra_postargs=[*COMMON_FLAGS, *flags],
                depends=ext.depends,
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [o for made in pool.map(compiled, sources) for o in made]
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
