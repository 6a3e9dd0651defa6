"""Builds the native CPU kernels: every source once per instruction-set level, with that level's
flags. A level whose flags the compiler does not know is left out; without a working C++ compiler
the package installs without any and says so when it runs."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

sys.path.insert(0, str(Path(__file__).parent))  # build front ends do not
from native_build import COMMON_FLAGS, LEVEL_FREE, defines_for, levels_for, machine

NATIVE = Path("platforms/cpu/native")


class BuildLevels(build_ext):
    def knows(self, flags: list[str]) -> bool:
        empty = Path(self.build_temp) / "flags.cpp"
        empty.parent.mkdir(parents=True, exist_ok=True)
        empty.write_text("")
        try:
            self.compiler.compile([str(empty)], output_dir=self.build_temp, extra_postargs=flags)
        except CompileError:
            return False
        return True

    def build_extension(self, ext: Extension) -> None:
        path = self.get_ext_fullpath(ext.name)
        if self.inplace and not self.force and Path(path).exists():
            built = Path(path).stat().st_mtime
            if all(Path(source).stat().st_mtime < built for source in ext.depends):
                return  # an editable install is made more than once
        levels = {n: flags for n, flags in levels_for(machine()).items() if self.knows(flags)}
        sources = [(f"level_{name}.cpp", flags) for name, flags in levels.items()]
        sources += [(f"{name}.cpp", []) for name in LEVEL_FREE]

        def compiled(source: tuple[str, list[str]]) -> list[str]:
            name, flags = source
            return self.compiler.compile(
                [str(NATIVE / name)],
                output_dir=self.build_temp,
                macros=defines_for(levels),
                include_dirs=[str(NATIVE)],
                extra_postargs=[*COMMON_FLAGS, *flags],
                depends=ext.depends,
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [o for made in pool.map(compiled, sources) for o in made]
        self.compiler.link_shared_object(
            objects,
            path,
            extra_postargs=["-pthread"],
            target_lang="c++",
        )


extension = Extension(
    "sixfold.platforms.cpu._native",
    sources=[],
    depends=["setup.py", "native_build.py", *(str(path) for path in NATIVE.glob("*"))],
    language="c++",
    optional=True,
)
# Windows' compiler knows neither these flags nor vector extensions.
setup(
    ext_modules=[] if sys.platform == "win32" else [extension],
    cmdclass={"build_ext": BuildLevels},
)
