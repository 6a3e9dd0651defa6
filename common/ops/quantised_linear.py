"""The linear layer on matrices in fewer bits, one contract per form (docs/weights.md).

Numbers and scales of a matrix are exact; what a kernel may round is the activations, to eight bits
with a scale per 32 of them or finer, and the products of a 16-bit dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np

from ...platforms.interface_kernels import Case, Op, Tolerance
from ..checkpoint.block_floats import MX_GROUP, SQUARE, Fp8Blocks, Mxfp4Rows
from ..checkpoint.quantised_rows import GROUP, QuantisedRows
from .contract import F32, normal
from .dense import linear, linear_dims

Stored = QuantisedRows | Fp8Blocks | Mxfp4Rows

TOLERANCE = {
    "float32": Tolerance(4e-2, 1e-2),
    "bfloat16": Tolerance(6e-2, 3e-2),
    "float16": Tolerance(4e-2, 1e-2),
}
"""Eight standard deviations of sums whose activations were rounded to eight bits."""


def quantised_linear(x: F32, weight: Stored, bias: F32 | None = None) -> F32:
    """x (T, K), weight (N, K) in its stored form, bias (N,) or None -> x @ values.T + bias."""
    return linear(x, stored_values(weight), bias)


def stored_values(weight: Stored) -> F32:
    """(N, K) numbers that a matrix stands for."""
    return rows_values(weight) if isinstance(weight, QuantisedRows) else weight.values()


def rows_values(weight: QuantisedRows) -> F32:
    """(N, K) numbers that the rows stand for."""
    count = weight.scale.shape[1]
    wide = weight.q.reshape(len(weight.q), count, -1).astype(np.float32)
    middle = 8.0 if weight.bits == 4 and weight.minimum is None else 0.0
    values = weight.scale[..., None] * (wide - np.float32(middle))
    values = values.reshape(weight.q.shape)
    if weight.minimum is not None:
        values = values - weight.minimum[..., None]
    values = values.reshape(len(values), -1)[:, : weight.columns]
    if weight.order is None:
        return np.asarray(values, np.float32)
    placed = np.empty_like(values)
    placed[:, weight.order] = values
    return placed


def _half(x: F32) -> F32:
    """Scales that fp16 has, so that a form that keeps them so loses nothing."""
    return x.astype(np.float16).astype(np.float32)


def int8_channel(rng: np.random.Generator, n: int, k: int) -> QuantisedRows:
    groups = -(-k // GROUP)
    q = rng.integers(-128, 128, (n, groups, GROUP)).astype(np.int8)
    step = _half(rng.uniform(0.5, 1.5, (n, 1)).astype(np.float32) * k**-0.5 / 74)
    return QuantisedRows(8, q, np.repeat(step, groups, axis=1), None, k)


def packed_int4(rng: np.random.Generator, n: int, k: int) -> QuantisedRows:
    groups = -(-k // GROUP)
    q = rng.integers(0, 16, (n, groups, GROUP)).astype(np.uint8)
    scale = _half(rng.uniform(0.5, 1.5, (n, groups)).astype(np.float32) * k**-0.5 / 4.6)
    return QuantisedRows(4, q, scale, None, k)


def awq_int4(rng: np.random.Generator, n: int, k: int) -> QuantisedRows:
    plain = packed_int4(rng, n, k)
    zeros = rng.integers(0, 16, plain.scale.shape)
    return QuantisedRows(4, plain.q, plain.scale, _half(plain.scale * zeros), k)


def fp8_block(rng: np.random.Generator, n: int, k: int) -> Fp8Blocks:
    """Every code but NaN, subnormals and the largest among them."""
    codes = rng.integers(0, 127, (n, k)) + 128 * rng.integers(0, 2, (n, k))
    shape = -(-n // SQUARE), -(-k // SQUARE)
    scales = rng.uniform(0.5, 1.5, shape).astype(np.float32) * np.float32(k**-0.5 / 120)
    return Fp8Blocks(codes.astype(np.uint8), scales)


def mxfp4(rng: np.random.Generator, n: int, k: int) -> Mxfp4Rows:
    k = -(-k // MX_GROUP) * MX_GROUP
    codes = rng.integers(0, 256, (n, k // 2)).astype(np.uint8)
    middle = 127 - int(np.ceil(np.log2(k**0.5 * 2.7)))
    return Mxfp4Rows(codes, rng.integers(middle - 2, middle + 1, (n, k // MX_GROUP), np.uint8))


def k_scales(rng: np.random.Generator, n: int, units: int, most: int, size: float) -> F32:
    """(n, units) float16 of eight neighbours times whole numbers of their own, as GGUF has them."""
    wide = rng.uniform(0.5, 1.5, (n, -(-units // 8))) * size / most
    common = _half(wide.astype(np.float32))
    own = rng.integers(most // 4, most + 1, (n, units)).astype(np.float32)
    return np.repeat(common, 8, axis=1)[:, :units] * own


def q4_k(rng: np.random.Generator, n: int, k: int) -> QuantisedRows:
    groups = -(-k // GROUP)
    q = rng.integers(0, 16, (n, groups, GROUP)).astype(np.uint8)
    scale = k_scales(rng, n, groups, 63, k**-0.5 / 3)
    return QuantisedRows(4, q, scale, 8 * k_scales(rng, n, groups, 63, k**-0.5 / 3), k)


def q5_k(rng: np.random.Generator, n: int, k: int) -> QuantisedRows:
    groups = -(-k // GROUP)
    q = rng.integers(0, 32, (n, groups, GROUP)).astype(np.int8)
    scale = k_scales(rng, n, groups, 63, k**-0.5 / 6)
    return QuantisedRows(8, q, scale, 16 * k_scales(rng, n, groups, 63, k**-0.5 / 6), k)


def q6_k(rng: np.random.Generator, n: int, k: int) -> QuantisedRows:
    """Scales by 16 columns, of either sign."""
    groups = -(-k // GROUP)
    q = rng.integers(-32, 32, (n, groups, GROUP)).astype(np.int8)
    scale = k_scales(rng, n, 2 * groups, 127, k**-0.5 / 12)
    return QuantisedRows(8, q, scale * rng.choice([-1.0, 1.0], scale.shape).astype("f4"), None, k)


def q8_0(rng: np.random.Generator, n: int, k: int) -> QuantisedRows:
    groups = -(-k // GROUP)
    q = rng.integers(-127, 128, (n, groups, GROUP)).astype(np.int8)
    scale = _half(rng.uniform(0.5, 1.5, (n, groups)).astype(np.float32) * k**-0.5 / 74)
    return QuantisedRows(8, q, scale, None, k)


FORMS: dict[str, Callable[[np.random.Generator, int, int], Stored]] = {
    "int8_channel": int8_channel,
    "packed_int4": packed_int4,
    "awq_int4": awq_int4,
    "fp8_block": fp8_block,
    "mxfp4": mxfp4,
}
GGUF_FORMS: dict[str, Callable[[np.random.Generator, int, int], Stored]] = {
    "q8_0": q8_0,
    "q4_0": packed_int4,
    "q4_1": awq_int4,
    "q4_k": q4_k,
    "q5_k": q5_k,
    "q6_k": q6_k,
}


def cases_of_form(form: Callable[..., Stored]) -> Callable[[np.random.Generator], Iterable[Case]]:
    """Cases of a contract whose matrices are of `form`."""

    def cases(rng: np.random.Generator) -> Iterable[Case]:
        for name, rows, k, n, biased in [
            ("one_row", 1, 64, 48, False),
            ("one_row_biased", 1, 96, 33, True),
            ("odd", 3, 70, 17, True),
            ("below_a_group", 2, 7, 5, False),
            ("edges_of_blocks", 5, 200, 130, False),
            ("many_rows", 37, 128, 96, False),
            ("one_output", 4, 576, 1, True),
            ("no_rows", 0, 32, 16, False),
        ]:
            weight = form(rng, n, k)
            bias = normal(rng, n) if biased else None
            x = normal(rng, rows, weight.shape[1])
            yield Case(name, {"x": x, "weight": weight, "bias": bias})
        weight = form(rng, 9, 96)
        if isinstance(weight, QuantisedRows) and weight.scale.shape[1] == weight.q.shape[1]:
            turned = replace(weight, order=rng.permutation(96).astype(np.int64))
            args = {"x": normal(rng, 4, 96), "weight": turned, "bias": None}
            yield Case("columns_out_of_order", args)

    return cases


OPS = tuple(
    Op("linear", quantised_linear, cases_of_form(form), TOLERANCE, weights=scheme, dims=linear_dims)
    for scheme, form in {**FORMS, **GGUF_FORMS}.items()
)
