"""The compiled kernels of this package: found, checked and called through ctypes.

The library is built when the package is installed (setup.py). Without a compiler there is none; the
generic torch kernels serve then, and `missing()` says why.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

ABI = 5
"""Version of the structs below and of the functions; a library of another version is not used."""

_AVX512 = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"})
LEVELS: tuple[tuple[str, frozenset[str]], ...] = (
    ("amxint8", _AVX512 | {"avx512_vnni", "amx_tile", "amx_int8"}),
    ("avx512vnni", _AVX512 | {"avx512_vnni"}),
    ("avx512", _AVX512),
    ("avxvnni", frozenset({"avx2", "fma", "f16c", "avx_vnni"})),
    ("avx2", frozenset({"avx2", "fma", "f16c"})),
    ("neoni8mm", frozenset({"asimd", "asimddp", "i8mm"})),
    ("neondot", frozenset({"asimd", "asimddp"})),
    ("neon", frozenset({"asimd"})),
    ("portable", frozenset()),
)
"""Instruction-set levels, best first, and the CPU features that each needs."""


class Instruction(ctypes.Structure):
    _fields_ = (
        ("op", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("chain", ctypes.c_int32),
        ("ahead", ctypes.c_int32),
        ("a", ctypes.c_int64 * 12),
        ("f", ctypes.c_float * 4),
    )


class WeightStruct(ctypes.Structure):
    _fields_ = (
        ("format", ctypes.c_int32),
        ("n", ctypes.c_int32),
        ("k", ctypes.c_int32),
        ("has_min", ctypes.c_int32),
        ("data", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("mins", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


class RopeShape(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int32) for name in ("heads", "kv_heads", "dim", "half"))


class SpecStruct(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("heads", "kv_heads", "dim", "window")),
        ("scale", ctypes.c_float),
        ("soft_cap", ctypes.c_float),
        ("format", ctypes.c_int32),
        ("row_bytes", ctypes.c_int32),
    )


class PlanStruct(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("rows", "page_size", "table_width", "tokens")),
        *((name, ctypes.c_void_p) for name in ("table", "query_start", "context", "slots", "work")),
        ("pieces", ctypes.c_int32),
        ("splits", ctypes.c_int32),
        ("merges", ctypes.c_void_p),
        ("merge_count", ctypes.c_int32),
        ("unused", ctypes.c_int32),
        ("partials", ctypes.c_void_p),
    )


def _candidates() -> list[Path]:
    folder = Path(__file__).parent
    return [folder / f"_native{suffix}" for suffix in EXTENSION_SUFFIXES]


@cache
def _open() -> tuple[ctypes.CDLL | None, str]:
    for path in _candidates():
        if not path.exists():
            continue
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            return None, f"{path.name} cannot be loaded: {error}"
        if library.sixfold_abi() != ABI:
            return None, f"{path.name} is of another version of this package: install it again"
        library.sixfold_team.restype = ctypes.c_void_p
        library.sixfold_team.argtypes = (ctypes.c_int, ctypes.c_char_p)
        library.sixfold_team_place.argtypes = (ctypes.c_void_p, ctypes.POINTER(ctypes.c_int))
        library.sixfold_team_free.argtypes = (ctypes.c_void_p,)
        library.sixfold_run.argtypes = (
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_int,
            ctypes.c_int64,
        )
        return library, ""
    return None, "the native kernels were not built: there was no C++ compiler at installation"


def missing() -> str | None:
    """Why there is no library, or None when there is one."""
    return _open()[1] or None


def usable_levels(features: frozenset[str]) -> list[str]:
    """The levels that this library has and a CPU with these features can run, best first. A level
    that the system refuses to the process (AMX tiles) is not among them."""
    library, _ = _open()
    if library is None:
        return []
    return [
        name
        for name, needs in LEVELS
        if needs <= features and library.sixfold_has_level(name.encode())
    ]


class Team:
    """Native threads that run instructions; the calling thread is one of them."""

    def __init__(self, threads: int, level: str) -> None:
        library, reason = _open()
        if library is None:
            raise RuntimeError(reason)
        self._library = library
        self.threads, self.level = threads, level
        self._handle = library.sixfold_team(threads, level.encode())
        if not self._handle:
            raise ValueError(f"this library has no level {level!r}")

    def place(self, cpus: Sequence[int]) -> bool:
        """Hold each thread to a CPU of its own, one entry each; the calling thread of `run` goes
        to the first whenever it runs. False: the system refuses."""
        if len(cpus) != self.threads:
            raise ValueError(f"{len(cpus)} CPUs for {self.threads} threads")
        places = (ctypes.c_int * len(cpus))(*cpus)
        return bool(self._library.sixfold_team_place(self._handle, places))

    def run(self, instructions: ctypes.Array[Instruction], count: int, tokens: int) -> None:
        self._library.sixfold_run(self._handle, instructions, count, tokens)

    def close(self) -> None:
        if self._handle:
            self._library.sixfold_team_free(self._handle)
            self._handle = None

    def __del__(self) -> None:
        self.close()


def instruction(op: int, rows: int, a: Sequence[int], f: Sequence[float] = ()) -> Instruction:
    return Instruction(op, rows, 0, 0, (ctypes.c_int64 * 12)(*a), (ctypes.c_float * 4)(*f))
