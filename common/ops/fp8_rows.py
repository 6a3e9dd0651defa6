"""Activations as eight-bit floats with a scale per block of channels, as block-scaled products and
DeepSeek-V4's cache take them; and the ops that round so what they have just turned.

Codes are e4m3: `fnuz` (one more of bias, up to 240, its only NaN where the other has -0) or `ocp`
(up to 448). Micikevicius et al. 2022, "FP8 formats for deep learning", section 3. Which of them a
device multiplies is a fact of it. A scale is the block's largest magnitude over the largest code,
or with `power` the next power of two (what an e8m0 byte can hold). Both divisions are of float32,
exact to its last bit, so that ties are the same everywhere; codes are rounded to even; zero has no
sign. Inputs are finite.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...platforms.interface_kernels import Case, Op, Tolerance
from .contract import F32, around_one, normal
from .interleaved_rope import interleaved_rope, shared_kv_norm_rope
from .rope import ANGLES

MOST = {"ocp": 448.0, "fnuz": 240.0}
BIAS = {"ocp": 7, "fnuz": 8}
LEAST_MAGNITUDE = 1e-4
"""Of a block, for its scale."""


def rounded_e4m3(values: NDArray[np.float64], form: str) -> F32:
    """The nearest value of the format, ties to the even code."""
    kept = np.clip(values, -MOST[form], MOST[form])
    _, exponent = np.frexp(kept)  # of a mantissa from 0.5 to 1
    step = np.exp2(np.maximum(exponent - 1, 1 - BIAS[form]) - 3.0)
    return (np.round(kept / step) * step + 0.0).astype(np.float32)


def block_quant(x: F32, block: int, power: bool, form: str) -> tuple[F32, F32]:
    """x (T, N), N a multiple of `block` -> e4m3 values (T, N), scales (T, N / block) float32: x is
    about values * scales."""
    parts = x.reshape(len(x), x.shape[1] // block, block)
    least, most = np.float32(LEAST_MAGNITUDE), np.float32(MOST[form])
    scale: F32 = np.maximum(np.abs(parts).max(-1, initial=0.0), least) / most
    if power:
        mantissa, exponent = np.frexp(scale)
        scale = np.exp2(exponent - (mantissa == 0.5)).astype(np.float32)
    values = rounded_e4m3((parts / scale[..., None]).astype(np.float64), form)
    return values.reshape(x.shape), scale


def inverse_rope_quant(
    x: F32, cos: F32, sin: F32, block: int, power: bool, form: str
) -> tuple[F32, F32]:
    """x (T, H, D), turned back by `interleaved_rope`, then its H * D channels by `block_quant`; D
    is a multiple of `block`. What the grouped product of an output takes."""
    turned = interleaved_rope(x, cos, sin, inverse=True)
    return block_quant(turned.reshape(len(x), x.shape[1] * x.shape[2]), block, power, form)


def qk_norm_rope_quant(
    q: F32,
    kv: F32,
    kv_weight: F32,
    eps: float,
    cos: F32,
    sin: F32,
    block: int,
    power: bool,
    form: str,
) -> tuple[F32, F32, F32, F32]:
    """`shared_kv_norm_rope`, then of kv the D - R channels that are not turned by `block_quant`
    (their number is a multiple of `block`) -> q, e4m3 values (T, D - R), scales, and the turned
    channels (T, R) as they are: how a cache in eight bits keeps a key."""
    queries, key = shared_kv_norm_rope(q, kv, kv_weight, eps, cos, sin)
    rest = key.shape[1] - 2 * cos.shape[1]
    return queries, *block_quant(key[:, :rest], block, power, form), key[:, rest:]


ROUNDED: Mapping[str, Tolerance] = {
    "float32": Tolerance(1e-5, 1e-5),
    "bfloat16": Tolerance(1e-2, 1e-2),
    "float16": Tolerance(2e-3, 2e-3),
}
"""Less than a step of the format (a sixteenth), which a value must then hit; queries and turned
channels are rounded to the dtype."""

SHAPES = [  # tokens, heads, dim, rotary, block
    ("one_token", 1, 3, 32, 8, 8),
    ("rest_beside_turned", 4, 2, 48, 20, 4),
    ("published_head", 2, 2, 512, 64, 64),
    ("no_tokens", 0, 2, 32, 8, 8),
]


def _forms(rng: np.random.Generator) -> Iterable[tuple[str, Any, dict[str, Any]]]:
    for name, *sizes, block in SHAPES:
        for form in MOST:
            for power in (True, False):
                title = f"{name}_{form}{'_power' if power else ''}"
                yield title, sizes, {"block": block, "power": power, "form": form}


def _uneven(rng: np.random.Generator, *shape: int) -> F32:
    """Sizes from 2^-14 to 2^7, and some zeros: blocks of unlike scales, values below the least. One
    bit more than a code has: with scales that are powers of two, half of them are ties."""
    sizes = np.exp2(rng.uniform(-14, 7, (*shape[:-1], 1)))
    spread = np.exp2(rng.uniform(-6, 0, shape))
    values = rng.standard_normal(shape) * sizes * spread * (rng.random(shape) > 0.1)
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.round(mantissa * 32) / 32, exponent).astype(np.float32)


def _angles(rng: np.random.Generator, tokens: int, rotary: int) -> dict[str, F32]:
    angles = rng.uniform(-3, 3, (tokens, rotary // 2))
    return {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}


def block_cases(rng: np.random.Generator) -> Iterable[Case]:
    for name, (tokens, heads, dim, _), numbers in _forms(rng):
        yield Case(name, {"x": _uneven(rng, tokens, heads * dim), **numbers})
    zeros = np.zeros((2, 16), np.float32)
    yield Case("zeros", {"x": zeros, "block": 8, "power": True, "form": "fnuz"})


def inverse_cases(rng: np.random.Generator) -> Iterable[Case]:
    for name, (tokens, heads, dim, rotary), numbers in _forms(rng):
        given = {"x": _uneven(rng, tokens, heads, dim), **_angles(rng, tokens, rotary)}
        yield Case(name, {**given, **numbers})


def norm_cases(rng: np.random.Generator) -> Iterable[Case]:
    for name, (tokens, heads, dim, rotary), numbers in _forms(rng):
        yield Case(
            name,
            {
                "q": normal(rng, tokens, heads, dim, scale=3.0),
                "kv": normal(rng, tokens, dim, scale=0.2),
                "kv_weight": around_one(rng, dim),
                "eps": 1e-6,
                **_angles(rng, tokens, rotary),
                **numbers,
            },
        )


def dims(args: Mapping[str, Any]) -> dict[str, int]:
    x = args["q" if "q" in args else "x"]
    sizes = {"heads": x.shape[1], "head_dim": x.shape[2]} if x.ndim == 3 else {}
    return {**sizes, "block": args["block"]}


FIXED = ANGLES | {"kv_weight"}

OPS = (
    Op("block_quant", block_quant, block_cases, ROUNDED, dims=dims),
    Op(
        "inverse_rope_quant",
        inverse_rope_quant,
        inverse_cases,
        ROUNDED,
        parts=("interleaved_rope", "block_quant"),
        float32=ANGLES,
        dims=dims,
    ),
    Op(
        "qk_norm_rope_quant",
        qk_norm_rope_quant,
        norm_cases,
        ROUNDED,
        parts=("shared_kv_norm_rope", "block_quant"),
        float32=FIXED,
        dims=dims,
    ),
)
