"""What mlx-lm's models call of MLX itself, under the contracts of the same ops.

They serve nothing here: a model calls them without asking. The suite runs them, so that what this
MLX computes on this device is checked like any other kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...common.checkpoint.block_floats import MX_GROUP, Mxfp4Rows
from ...common.checkpoint.quantised_rows import GROUP, QuantisedRows
from ...common.errors import KernelError
from ...common.ops.gated_delta import EPS
from ...common.ops.registry import KernelRegistry
from ..interface import DeviceFacts
from ..interface_kernels import Kernel, Problem
from . import page_products, softmax_attention
from .forms import PARTS
from .page_kernels import paged_attention

PROVIDER = "mlx"
AFFINE = frozenset({"int8_channel", "packed_int4", "awq_int4"})
SCHEMES = AFFINE | {"mxfp4"}


@dataclass(frozen=True, slots=True)
class Packed:
    """A matrix as `mx.quantized_matmul` takes it; `biases` None where the mode has none."""

    codes: mx.array
    scales: mx.array
    biases: mx.array | None
    bits: int
    group: int
    mode: str
    order: mx.array | None = None


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    return mx.fast.rms_norm(x, weight, eps)


def layer_norm(x: mx.array, weight: mx.array, bias: mx.array | None, eps: float) -> mx.array:
    return mx.fast.layer_norm(x, weight, bias, eps)


def silu_mul(gate: mx.array, up: mx.array) -> mx.array:
    return nn.silu(gate) * up


def linear(x: mx.array, weight: mx.array | Packed, bias: mx.array | None = None) -> mx.array:
    result = _times(x, weight) if isinstance(weight, Packed) else x @ weight.T
    return result if bias is None else result + bias


def _times(x: mx.array, weight: Packed) -> mx.array:
    if not len(x):  # MLX's CPU backend ends the process there
        return mx.zeros((0, len(weight.codes)), x.dtype)
    x = x if weight.order is None else x[:, weight.order]
    x = mx.pad(x, [(0, 0), (0, weight.scales.shape[1] * weight.group - x.shape[1])])
    biases = None if weight.biases is None else weight.biases.astype(x.dtype)
    scales = weight.scales if biases is None else weight.scales.astype(x.dtype)
    return mx.quantized_matmul(
        x,
        weight.codes,
        scales,
        biases,
        transpose=True,
        group_size=weight.group,
        bits=weight.bits,
        mode=weight.mode,
    )


def prepare(weight: Any, problem: Problem) -> mx.array | Packed:
    if isinstance(weight, QuantisedRows):
        return _affine(weight)
    if isinstance(weight, Mxfp4Rows):
        codes = mx.array(np.ascontiguousarray(weight.codes).view(np.uint32))
        return Packed(codes, mx.array(weight.scales), None, 4, MX_GROUP, "mxfp4")
    raise KernelError(f"{PROVIDER!r} has no form for {type(weight).__name__}.")


def _affine(weight: QuantisedRows) -> Packed:
    """value = scale * q + bias with q from 0."""
    flat = weight.q.reshape(len(weight.q), -1)
    codes = flat if weight.bits == 4 else (flat.view(np.uint8) ^ np.uint8(128))
    biases = -weight.scale * np.float32(1 << (weight.bits - 1))
    if weight.minimum is not None:
        biases = (biases if weight.bits == 8 else 0.0) - weight.minimum
    if weight.bits == 4:
        codes = codes[:, ::2] | (codes[:, 1::2] << 4)
    words = mx.array(np.ascontiguousarray(codes).view(np.uint32))
    order = None if weight.order is None else mx.array(weight.order.astype(np.int32))
    parts = mx.array(weight.scale), mx.array(biases.astype(np.float32))
    return Packed(words, *parts, weight.bits, GROUP, "affine", order)


def gated_delta(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    a: mx.array,
    b: mx.array,
    a_log: mx.array,
    dt_bias: mx.array,
    state: mx.array,
    slots: mx.array,
    query_start: mx.array,
    context_lens: mx.array,
) -> tuple[mx.array, mx.array]:
    """Row by row, as mlx-lm runs a prompt. MLX keeps the state as (Dv, Dk)."""
    q, k = _unit(q) * q.shape[-1] ** -0.5, _unit(k)
    gamma = mx.exp(-mx.exp(a_log) * nn.softplus(a.astype(mx.float32) + dt_bias))
    beta = mx.sigmoid(b.astype(mx.float32))
    starts, where_kept, contexts = (
        np.array(x).tolist() for x in (query_start, slots, context_lens)
    )
    results = [mx.zeros((0, *v.shape[1:]), v.dtype)]
    for row, (slot, context) in enumerate(zip(where_kept, contexts, strict=True)):
        where = slice(starts[row], starts[row + 1])
        if slot < 0:
            results.append(mx.zeros_like(v[where]))
            continue
        past = state[slot] if context else mx.zeros_like(state[slot])
        made, after = mx.fast.gated_delta_update(
            q[where][None],
            k[where][None],
            v[where][None].astype(mx.float32),
            gamma[where][None],
            beta[where][None],
            initial_state=past.swapaxes(1, 2)[None],
        )
        results.append(made[0].astype(v.dtype))
        state[slot] = after[0].swapaxes(1, 2)
    return mx.concatenate(results), state


def _unit(x: mx.array) -> mx.array:
    wide = x.astype(mx.float32)
    return wide * mx.rsqrt((wide * wide).sum(axis=-1, keepdims=True) + EPS)


def _requires(facts: DeviceFacts, problem: Problem) -> str | None:
    if problem.weights and problem.weights not in SCHEMES:
        return f"has no {problem.weights} weights"
    if problem.weights in AFFINE and problem.dtype == "bfloat16":
        return "keeps the offset of a group in the dtype, of which bfloat16 rounds too much"
    return None


def _float32(facts: DeviceFacts, problem: Problem) -> str | None:
    return None if problem.dtype == "float32" else page_products.ONLY_FLOAT32


def register_primitives(registry: KernelRegistry) -> None:
    for fn in (rms_norm, layer_norm, silu_mul, gated_delta):
        registry.add(Kernel(fn.__name__, PROVIDER, _requires, fn))
    # The forms that `forms.py` may choose instead.
    registry.add(Kernel("silu_mul", PARTS, _requires, softmax_attention.silu_mul))
    in_parts = partial(paged_attention, attend=softmax_attention.attend)
    registry.add(Kernel("paged_attention", PARTS, _requires, in_parts))
    registry.add(Kernel("paged_attention", "products", _float32, page_products.over_any_pages))
    registry.add(Kernel("linear", PROVIDER, _requires, linear, prepare=prepare))
