"""Guards the emulator that the Metal kernels are tested with: it computes what Metal would, and
what a kernel must not do does not pass."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from support.metal_emulator import Emulator, MetalFault, needs_compiler

from sixfold.platforms.mlx.metal.launch import Launch, MetalSource

pytestmark = needs_compiler()


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    return Emulator(tmp_path_factory.mktemp("metal"))


def run(
    emulator: Emulator,
    body: str,
    x: mx.array,
    out: int = 64,
    dtype: mx.Dtype = mx.float32,
    threads: tuple[int, int, int] = (64, 1, 1),
    contiguous: bool = True,
    **template: Any,
) -> np.ndarray:
    source = MetalSource("probe", ("x",), ("y",), body, contiguous=contiguous)
    call = Launch([x], list(template.items()), threads, 64, [(out,)], [dtype])
    (found,) = emulator.launch(source, call)
    return np.array(found.astype(mx.float32))


AT = "const uint i = thread_position_in_grid.x;\n"
X = mx.arange(64).astype(mx.float32)


def test_threads_see_their_places(emulator: Emulator) -> None:
    body = """
    const uint flat = thread_position_in_grid.x +
        128 * (thread_position_in_grid.y + 2 * thread_position_in_grid.z);
    const bool whole = threads_per_threadgroup.x == 64 && threadgroups_per_grid.x == 2 &&
        threadgroup_position_in_grid.x * 64 + thread_position_in_threadgroup.x ==
            thread_position_in_grid.x &&
        thread_index_in_simdgroup + 32 * simdgroup_index_in_threadgroup ==
            thread_index_in_threadgroup;
    y[flat] = whole ? flat + x[0] : -1.0f;
    """
    found = run(emulator, body, X, out=128 * 2 * 3, threads=(128, 2, 3))
    np.testing.assert_array_equal(found, np.arange(128 * 2 * 3))


def test_simdgroups_and_threadgroups_meet(emulator: Emulator) -> None:
    body = (
        AT
        + """
    threadgroup float sums[2];
    const float sum = simd_sum(x[i]);
    if (thread_index_in_simdgroup == 0) sums[simdgroup_index_in_threadgroup] = sum;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const float largest = simd_max(x[i]);
    const int smallest = simd_min(int(x[i]));
    y[i] = sums[0] + 10000 * sums[1] + largest - smallest;
    """
    )
    low, high = float(X[:32].sum()), float(X[32:].sum())
    np.testing.assert_array_equal(run(emulator, body, X), low + 10000 * high + 31)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_narrow_floats_round_as_mlx_rounds(dtype: mx.Dtype, emulator: Emulator) -> None:
    rng = np.random.default_rng(0)
    sizes = 2.0 ** rng.integers(-30, 20, 1 << 14)
    values = (rng.standard_normal(1 << 14) * sizes).astype(np.float32)
    values[:9] = [0.0, -0.0, np.inf, -np.inf, np.nan, 65519.9, 65520.0, 2.0**-25, 3 * 2.0**-25]
    x = mx.array(values)
    body = AT + "y[i] = T(float(T(x[i])));"
    found = run(emulator, body, x, x.size, dtype, (x.size, 1, 1), T=dtype)
    np.testing.assert_array_equal(found, np.array(x.astype(dtype).astype(mx.float32)))


def test_strides_are_the_arrays_own(emulator: Emulator) -> None:
    x = mx.arange(64).astype(mx.float32).reshape(4, 16).T
    body = AT + "y[i] = x[(i / 4) * x_strides[0] + (i % 4) * x_strides[1]] + x_shape[1];"
    found = run(emulator, body, x, contiguous=False)
    np.testing.assert_array_equal(found, np.array(x).reshape(-1) + 4)
    assert (run(emulator, AT + "y[i] = x_strides[0];", x) == 4).all()


FAULTS = [
    ("y[i] = x[i + 1];", r"reads x\[64\], it has 64"),
    ("y[i + 1] = x[i];", r"writes y\[64\], it has 64"),
    ("y[i / 2] = x[i];", r"two threads write y\[0\]"),
    ("if (i > 0) y[i] = x[i];", "1 elements of an output were not written"),
    ("if (i < 5) threadgroup_barrier(mem_flags::mem_threadgroup); y[i] = 1;", "wait at line 2"),
    ("y[i] = i < 5 ? simd_sum(x[i]) : 0;", "5 of 64 threads wait at line 2"),
    (
        "if (i < 5)\n y[i] = simd_sum(x[i]);\n else\n y[i] = simd_sum(x[i]);",
        "threads meet at lines 3 and 5",
    ),
    ("threadgroup float a[64]; a[i] = x[i]; y[i] = a[(i + 1) % 64];", "which thread runs first"),
    (
        "threadgroup float a[9000]; a[i] = x[i]; "
        "threadgroup_barrier(mem_flags::mem_threadgroup); y[i] = a[63 - i];",
        "36000 bytes in a threadgroup",
    ),
]


@pytest.mark.parametrize(("body", "said"), FAULTS)
def test_what_a_kernel_must_not_do(body: str, said: str, emulator: Emulator) -> None:
    with pytest.raises(MetalFault, match=said):
        run(emulator, AT + body, X)


def test_memory_of_a_threadgroup_starts_as_nothing(emulator: Emulator) -> None:
    body = AT + "threadgroup float a[64]; y[i] = a[i]; if (i > 64) a[i] = 0;"
    assert np.isnan(run(emulator, body, X)).all()
