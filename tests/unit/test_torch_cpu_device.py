"""Guards what the CPU device decides (threads, dtype, cache share) and that arrays cross whole."""

from __future__ import annotations

import ctypes
import sys

import numpy as np
import pytest
import torch
from support.kernel_checks import cpu_facts

from sixfold.platforms.cpu.device import CpuDevice
from sixfold.platforms.cpu.native_library import missing

AMX = frozenset({"avx512f", "amx_bf16", "avx512_bf16"})
AVX512_BF16 = frozenset({"avx512f", "avx512_bf16"})


@pytest.mark.parametrize(
    ("features", "stored", "dtype"),
    [
        (frozenset(), "bfloat16", "float32"),
        (AVX512_BF16, "bfloat16", "float32"),  # vector instructions, no matrix units
        (AMX, "bfloat16", "bfloat16"),
        (AMX, "", "bfloat16"),
        (AMX, "float32", "float32"),
    ],
)
def test_the_dtype_follows_the_matrix_units(features: frozenset, stored: str, dtype: str) -> None:
    chosen, because = CpuDevice(cpu_facts(features=features)).default_dtype(stored)
    assert chosen == dtype
    assert because


def test_threads_are_the_usable_cores_unless_set() -> None:
    decision, *_ = CpuDevice(cpu_facts(cores=6)).decisions()
    assert decision.chosen == "6"
    decision, *_ = CpuDevice(cpu_facts(cores=6), threads=2).decisions()
    assert (decision.chosen, decision.because) == ("2", "set by the user")
    assert CpuDevice(cpu_facts(cores=0)).threads == 1


def _of(device: CpuDevice, what: str) -> str:
    return next(d.chosen for d in device.decisions() if d.what == what)


def test_the_level_of_the_native_kernels_is_recorded_with_what_others_need() -> None:
    device = CpuDevice(cpu_facts(features=frozenset({"avx2", "fma", "f16c"})))
    decision = next(d for d in device.decisions() if d.what == "native kernels")
    assert decision.chosen == device.level
    if device.level == "avx2":
        assert ("avxvnni", "needs avx_vnni") in decision.rejected
        assert "neon" not in dict(decision.rejected)


def test_what_happens_to_freed_memory_is_recorded() -> None:
    device = CpuDevice(cpu_facts())
    assert _of(device, "freed memory") == "left to the C library"
    device.prepare()
    kept = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt")
    assert (_of(device, "freed memory") == "kept for reuse") == kept


def test_attach_sets_the_threads() -> None:
    before = torch.get_num_threads()
    CpuDevice(cpu_facts(), threads=1).attach()
    assert torch.get_num_threads() == 1
    torch.set_num_threads(before)


def test_the_default_cache_is_a_share_of_what_the_weights_leave() -> None:
    size, because = CpuDevice(cpu_facts()).cache_budget(free=9000, weights=1000)
    assert size == 2000
    assert "quarter" in because


def test_arrays_cross_unchanged_in_both_directions() -> None:
    device = CpuDevice(cpu_facts())
    for array in (
        np.arange(12, dtype=np.int32).reshape(3, 4)[:, ::2],
        np.zeros((0, 3), np.float32),
        np.frombuffer(b"\x01\x02", np.uint8),
    ):
        np.testing.assert_array_equal(device.to_host(device.to_device(array)), array)
    free, total = device.memory()
    assert 0 < free <= total
    device.event().wait()
    device.synchronize()
    assert (device.graphs is None) == (missing() is not None)
