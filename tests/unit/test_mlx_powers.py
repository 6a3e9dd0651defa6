"""Guards 2^x put together from sums and products: as exact as told, 0 for what is hidden, NaN kept,
and large arrays only."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from sixfold.platforms.mlx.powers import MANY, power_of_two

ALLOWED = 4e-7


def worst(made: mx.array, x: np.ndarray) -> float:
    wanted = np.exp2(x.astype(np.float64))
    return float((np.abs(np.array(made).astype(np.float64) - wanted) / wanted).max())


@pytest.mark.parametrize("shape", [(MANY,), (3, 5, MANY // 8 + 1), (MANY - 1,)])
def test_it_is_as_exact_as_told(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(len(shape))
    x = rng.uniform(-126, 127, shape).astype(np.float32)
    x.flat[: MANY // 2] = rng.uniform(-1.5, 1.5, MANY // 2)  # where rounding changes sides
    assert worst(power_of_two(mx.array(x)), x) <= ALLOWED
    assert worst(power_of_two(mx.array(x)) * (1 + 2 * ALLOWED), x) > ALLOWED  # it can fail


def test_ends_hidden_values_and_nan() -> None:
    x = np.full(MANY, -0.5, np.float32)
    ends = [0.0, 1.0, -126.0, 127.0, -127.0, -np.inf, -1e30, -3e38, np.nan, -np.nan]
    x[: len(ends)] = ends
    made = np.array(power_of_two(mx.array(x)))[: len(ends)]
    np.testing.assert_array_equal(made[:8], [1.0, 2.0, 2.0**-126, 2.0**127, 0, 0, 0, 0])
    assert np.isnan(made[8:]).all()
    poison = np.array([0xFFFFFFFF, 0x7F800001], np.uint32).view(np.float32)
    x[:2] = poison
    assert np.isnan(np.array(power_of_two(mx.array(x)))[:2]).all()


def test_what_is_between_the_least_normal_number_and_zero_is_next_to_zero() -> None:
    x = np.linspace(-127, -126, MANY, dtype=np.float32)
    made = np.array(power_of_two(mx.array(x)))
    assert (made >= 0).all()
    assert made.max() <= 2.0**-126


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_other_dtypes_are_powers_as_mlx_has_them(dtype: mx.Dtype) -> None:
    x = mx.random.uniform(-4, 4, (MANY,)).astype(dtype)
    assert mx.array_equal(power_of_two(x), mx.power(2.0, x))
