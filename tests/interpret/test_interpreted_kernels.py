"""Guards law 8 for the Triton kernels: in Triton's interpreter each passes all cases of its op in
every dtype, cut for 32 and for 64 lanes; and a fault in a source is caught.

bfloat16 is right here only because kernels widen it as they load it: see the canary.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from support.interpreted_cases import FEW
from support.kernel_checks import verdict_of
from support.triton_checks import WARP_64, is_caught, triton_facts, triton_registry, with_fault

from sixfold.common.ops import OPS
from sixfold.platforms.interface import DeviceFacts
from sixfold.platforms.interface_kernels import Kernel, Problem
from sixfold.platforms.torch_runtime.dtypes import DTYPES
from sixfold.platforms.triton_kernels import tuning
from sixfold.platforms.triton_kernels.register import OPS as MODULES
from sixfold.platforms.triton_kernels.register import PRODUCTS

KERNELS = [kernel for kernel in triton_registry().kernels() if kernel.op not in FEW]


def dtypes(op: str) -> list[str]:
    """The interpreter multiplies bfloat16 by its bit patterns. Some ops take the same inputs
    whatever the dtype of the model, and products of experts take long here."""
    if op in PRODUCTS or op in ("sample", "draw", "page_digest"):
        return ["float32"]
    return list(DTYPES)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.op)
def test_kernel_equals_its_reference(kernel: Kernel) -> None:
    ran = 0
    for dtype in dtypes(kernel.op):
        assert kernel.requires(triton_facts(), Problem(kernel.op, dtype)) is None
        verdict = verdict_of(OPS[kernel.op], kernel.fn, dtype)
        assert verdict.status == "pass", verdict
        ran += verdict.passed
    assert ran > 0, "no case ran"


@pytest.mark.parametrize("facts", [triton_facts(), WARP_64], ids=lambda f: f"{f.lane_width}_lanes")
@pytest.mark.parametrize("elements", [1, 500, 4096, 1 << 15])
def test_a_tile_has_a_power_of_two_of_warps(facts: DeviceFacts, elements: int) -> None:
    row = tuning.choose(facts)
    warps = row.warps(elements)
    assert 1 <= warps <= row.most_warps
    assert warps & (warps - 1) == 0
    assert warps == 1 or elements >= warps * facts.lane_width


@pytest.mark.parametrize("op", ["rms_norm", "qk_norm_rope", "silu_mul"])
def test_64_lanes(op: str) -> None:
    kernel = next(k for k in triton_registry(WARP_64).kernels() if k.op == op)
    verdict = verdict_of(OPS[op], kernel.fn)
    assert verdict.status == "pass", verdict


def test_strided_inputs_give_what_contiguous_ones_do() -> None:
    """Models hand over parts of one product: gate and up, or q, k and v side by side."""
    ops = {kernel.op: kernel.fn for kernel in KERNELS}
    torch.manual_seed(0)
    both = torch.randn(5, 2 * 48)
    gate, up = both.chunk(2, dim=1)
    assert torch.equal(ops["silu_mul"](gate, up), ops["silu_mul"](*map(torch.clone, (gate, up))))
    q, k, v = torch.randn(5, 8, 16).split((4, 2, 2), dim=1)
    weight, angles = torch.randn(16), torch.randn(5, 8)
    one = ops["qk_norm_rope"](q, k, weight, weight, 1e-6, angles, angles)
    other = ops["qk_norm_rope"](
        q.contiguous(), k.contiguous(), weight, weight, 1e-6, angles, angles
    )
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert torch.equal(ops["rms_norm"](q, weight, 1e-6), ops["rms_norm"](q.clone(), weight, 1e-6))
    storage = torch.zeros(2, 12, 2, 16)
    for keys, values in (storage, (storage[0], torch.zeros(2, 12, 16).transpose(0, 1))):
        ops["kv_write"](keys, values, torch.tensor([3, 9, 4, 1, 0]), k, v)
        assert torch.equal(keys[9], k[1])
        assert torch.equal(values[4], v[2])


FAULTS = [
    ("rms_norm", "/ width + eps", "/ (width - 1) + eps"),
    ("add_rms_norm", "x += tl.load(from_row", "x -= tl.load(from_row"),
    ("rope", "second * cos + first * sin", "second * cos - first * sin"),
    ("rope", "rest_column = 2 * HALF +", "rest_column = 2 * HALF + 1 +"),
    ("qk_norm_rope", "squares / DIM", "squares / (DIM - 1)"),
    ("silu_mul", "tl.exp(-inner)", "tl.exp(inner)"),
    ("gelu_tanh_mul", "0.044715", "0.04"),
    ("layer_norm", "tl.where(inside, x - tl", "tl.where(inside, x + tl"),
    ("layer_norm", "apart = tl.where(inside, x", "apart = tl.where(row >= 0, x"),
    ("clamped_swiglu", "tl.where(up < -limit, -limit, up)", "up"),
    ("merge_state", "mask = inside & (two != nothing)[:, None]", "mask = inside"),
    ("merge_state", "shift = tl.where(most == nothing, 0.0, most)", "shift = 0.0"),
    ("embedding", "token * table_stride + column", "token * table_stride + (column ^ 1)"),
    ("kv_write", "slot // PAGE_SIZE * page_stride", "(slot ^ 1) // PAGE_SIZE * page_stride"),
    ("page_copy", "index.to(tl.int64)\n    target", "(index ^ 1).to(tl.int64)\n    target"),
    ("page_digest", "place < count", "place + 1 < count"),
    ("page_digest", "place // DIM % heads", "place // DIM % 2"),
    ("sample", "wins = value > most", "wins = value >= most"),
    ("sample", "tl.where(x == x, x, float(\"-inf\"))", "tl.where(x == x, x, 9.0)"),
    ("moe", "logit = logit.to(tl.float32)", "logit = -logit.to(tl.float32)"),
    ("moe_experts", "* BLOCK_M, 0), axis=0)", "* (BLOCK_M + 1), 0), axis=0)"),
    ("moe_experts", "matrix + 1, column", "matrix, column"),
    ("moe_experts", "bias_ptr + output", "bias_ptr + column"),
    ("moe_experts", "load(factors_ptr + at) * value", "load(factors_ptr + at - place) * value"),
    ("moe_experts", "clamped(out, up, limit, slope, offset, AFTER)", "out * up"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "old", "new"), FAULTS)
def test_a_faulty_source_is_caught(op: str, old: str, new: str, tmp_path: Path) -> None:
    fn = getattr(with_fault(MODULES[op], old, new, tmp_path), op)
    assert is_caught(OPS[op], partial(fn, tuning.choose(triton_facts())))


@triton.jit
def _product(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(x_ptr + at), tl.load(y_ptr + at)))


def _error(dtype: torch.dtype) -> float:
    torch.manual_seed(0)
    x, y = (torch.randn(16, 16).to(dtype) for _ in range(2))
    out = torch.empty(16, 16)
    with np.errstate(all="ignore"):
        _product[(1,)](x, y, out, N=16)
    return float((out - x.float() @ y.float()).abs().max())


def test_canary_products_of_bfloat16_are_wrong_in_the_interpreter() -> None:
    """When this fails, Triton has mended it: let `dtypes` above, and attention, have bfloat16."""
    assert _error(torch.float16) < 1e-5
    assert _error(torch.float32) < 1e-5
    assert not _error(torch.bfloat16) < 1.0
