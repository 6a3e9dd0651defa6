"""Guards that the C library keeps what MLX frees on a CPU, and that it is told where it cannot."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from sixfold.platforms.mlx import memory

MAPPED = """
import ctypes
from sixfold.platforms.mlx.memory import keep_freed

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
        "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

process = ctypes.CDLL(None)
process.mallinfo2.restype = Info
process.malloc.restype = ctypes.c_void_p

def mapped():
    before = process.mallinfo2().hblkhd
    process.malloc(ctypes.c_size_t(16 << 20))
    return process.mallinfo2().hblkhd - before >= 16 << 20

print(mapped(), keep_freed().chosen, mapped())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks glibc")
def test_large_arrays_are_not_mapped_one_by_one() -> None:
    command = [sys.executable, "-c", MAPPED]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.strip() == "True kept, up to 1024 MiB False"


@pytest.mark.parametrize(
    ("process", "because"),
    [
        (SimpleNamespace(), "it has no mallopt"),
        (SimpleNamespace(mallopt=lambda name, value: 0), "mallopt refused to change it"),
    ],
)
def test_a_library_that_keeps_its_own_way_is_told(
    process: SimpleNamespace, because: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: process)
    decision = memory.keep_freed()
    assert (decision.chosen, decision.because) == ("as the C library has it", because)
