"""Guards law 8 on MLX: every kernel that the platform registers passes all cases of its op, and the
pools keep what they were given: pages, states, copies, the canonical form."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from support.run_mlx import mlx_facts

from sixfold.common.ops import OPS
from sixfold.common.ops.conformance import run_suite
from sixfold.platforms.interface_kv import KVGroup, KVKind, StateArray
from sixfold.platforms.mlx import PLATFORM
from sixfold.platforms.mlx.kernels import GENERIC
from sixfold.platforms.mlx.metal.register import NEEDS_METAL
from sixfold.platforms.mlx.page_products import ONLY_FLOAT32
from sixfold.platforms.mlx.pools import LayerPages, LayerStates, MLXPages

SUITE = PLATFORM.conformance(mlx_facts())
NOT_KEPT = ("int8_token", "fp8_block", "q4_0", "q4_1", "q4_k", "q5_k", "q6_k", "q8_0")
REFUSED = {
    ("metal", NEEDS_METAL),
    ("products", ONLY_FLOAT32),
    *(("mlx", f"has no {form} weights") for form in NOT_KEPT),
}


def test_what_the_executor_calls_is_under_test() -> None:
    assert {s.op for s in SUITE.subjects if s.provider == "generic"} == set(GENERIC)


@pytest.mark.parametrize("op", sorted({subject.op for subject in SUITE.subjects}))
def test_every_kernel_equals_its_reference(op: str) -> None:
    for verdict in run_suite(SUITE, {op: OPS[op]}):
        assert verdict.status in ("pass", "unsupported"), verdict
        if verdict.status == "unsupported":
            assert {(verdict.provider, reason) for reason in verdict.refused} <= REFUSED


GROUP = KVGroup("full", KVKind.FULL, 4, 9)


def filled(heads: int = 2, dim: int = 8, layers: int = 2) -> tuple[MLXPages, list[LayerPages]]:
    made = [LayerPages(GROUP, heads, dim, dim, mx.float32) for _ in range(layers)]
    rng = np.random.default_rng(1)
    for layer in made:
        for i, array in enumerate(layer.arrays):
            layer.arrays[i] = mx.array(rng.standard_normal(array.shape).astype(np.float32))
    return MLXPages(GROUP, made, "float32"), made


def test_pages_travel_in_the_canonical_form() -> None:
    pool, layers = filled()
    data = pool.export_page(3)
    values = np.frombuffer(data, "<f4").reshape(2, 2, 4, 2, 8)  # layer, kv, token, head, dim
    key = np.array(layers[1].arrays[0]).reshape(2, 9, 4, 8)  # head, page, token, dim
    np.testing.assert_array_equal(values[1, 0], key[:, 3].swapaxes(0, 1))
    before = [np.array(a) for layer in layers for a in layer.arrays]
    pool.import_page(5, data)
    assert pool.export_page(5) == data
    assert pool.export_page(3) == data
    after = [np.array(a).reshape(2, 9, 4, 8) for layer in layers for a in layer.arrays]
    for old, new in zip(before, after, strict=True):
        others = [page for page in range(9) if page != 5]
        np.testing.assert_array_equal(old.reshape(2, 9, 4, 8)[:, others], new[:, others])
    with pytest.raises(ValueError, match="has 1024 bytes, got 1023"):
        pool.import_page(1, data[:-1])


def test_copies_of_pages_and_states() -> None:
    pool, _ = filled()
    second = pool.export_page(2)
    pool.copy([2, 4], [7, 1])
    assert pool.export_page(7) == second
    states = LayerStates(KVGroup("r", KVKind.RECURRENT, 4, 5), [StateArray((3, 2), "float32")])
    states.arrays[0][2] = mx.full((3, 2), 7.0)
    states.copy([2], [4])
    states.arrays[0][2] = mx.zeros((3, 2))
    np.testing.assert_array_equal(np.array(states.arrays[0])[4], np.full((3, 2), 7.0))


def test_a_write_by_slot_is_read_back_by_page() -> None:
    pool, layers = filled(layers=1)
    new = np.arange(2 * 2 * 8, dtype=np.float32).reshape(2, 2, 8)  # token, head, dim
    pool.write(0, mx.array([4 * 4 + 1, 8 * 4 + 3]), mx.array(new), mx.array(-new))
    keys, values = (np.array(half) for half in pool.page_view(0, 4))
    np.testing.assert_array_equal(keys[:, 1], new[0])
    np.testing.assert_array_equal(values[:, 1], -new[0])
    np.testing.assert_array_equal(np.array(pool.page_view(0, 8)[0])[:, 3], new[1])
    assert layers[0].arrays[0].shape == (2 * 9 * 4, 8)
