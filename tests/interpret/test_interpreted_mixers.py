"""Guards law 8 for the Triton kernels of mixers: in Triton's interpreter they pass their contracts,
cut for 32 and for 64 lanes (a few cases of each; all with --all-cases), and faults are caught."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.interpreted_cases import FEW, ON_64_LANES
from support.triton_checks import (
    WARP_64,
    is_caught,
    triton_facts,
    triton_registry,
    verdict_on,
    with_fault,
)

from sixfold.common.ops import OPS
from sixfold.platforms.interface import DeviceFacts
from sixfold.platforms.torch_runtime import kernels as generic
from sixfold.platforms.triton_kernels import (
    compress,
    fp8_rows,
    hyper_connections,
    tuning,
    vector_attention,
)
from sixfold.platforms.triton_kernels.register import OPS as MODULES

FACTS = [triton_facts(), WARP_64]


def kernel_of(op: str, facts: DeviceFacts | None = None) -> Any:
    return next(k for k in triton_registry(facts).kernels() if k.op == op)


@pytest.mark.parametrize(
    ("op", "facts", "some"),
    [
        *((op, FACTS[0], cases) for op, cases in FEW.items()),
        *((op, WARP_64, cases) for op, cases in ON_64_LANES.items()),
    ],
    ids=lambda x: f"{x.lane_width}_lanes" if isinstance(x, DeviceFacts) else str(x),
)
def test_kernel_equals_its_reference(
    op: str, facts: DeviceFacts, some: tuple[str, ...], request: pytest.FixtureRequest
) -> None:
    complete = request.config.getoption("--all-cases")
    names = () if complete else some
    verdict = verdict_on(OPS[op], names, kernel_of(op, facts).fn, "float32")
    assert verdict.status == "pass", verdict
    if complete:
        verdict = verdict_on(OPS[op], (), kernel_of(op, facts).fn, "float16")
        assert verdict.status == "pass", verdict


@pytest.mark.parametrize("op", ["gated_delta", "compressed_attention", "compress_norm_rope_store"])
def test_sixteen_bits(op: str) -> None:
    verdict = verdict_on(OPS[op], FEW[op][:1], kernel_of(op).fn, "float16")
    assert verdict.status == "pass", verdict


def test_the_gated_delta_rule_has_its_chunks_on_64_lanes_only() -> None:
    """So that both forms are tested above."""
    cuts = [tuning.choose(facts).delta_single for facts in FACTS]
    assert cuts == [0, 4]


def mixer(conv: Any, delta: Any) -> list[torch.Tensor]:
    """The result and both states, of inputs that are parts of one product and of states that are
    one layer of all."""
    torch.manual_seed(0)
    starts = torch.tensor([0, 6, 7, 9], dtype=torch.int32)
    rows = torch.tensor([2, 0, 1]).int(), starts, torch.tensor([3, 0, 1]).int()
    mixed, gates = torch.randn(9, 80), torch.randn(9, 4)
    states, kept = torch.randn(3, 2, 2, 16, 16), torch.randn(3, 2, 3, 64)
    weight, per_head = torch.randn(64, 4), torch.randn(2, 2)
    through, _ = conv(mixed[:, :64], weight, None, kept[:, 1], *rows, True)
    heads = through.unflatten(1, (4, 16)).split((1, 1, 2), dim=1)
    out, _ = delta(*heads, *gates.split(2, dim=1), *per_head, states[:, 1], *rows)
    return [out, states, kept]


@pytest.mark.parametrize("facts", FACTS, ids=lambda f: f"{f.lane_width}_lanes")
def test_views_give_what_the_generic_kernels_give(facts: DeviceFacts) -> None:
    ops = ("conv1d_update", "gated_delta")
    wanted = mixer(*(generic.GENERIC[op] for op in ops))
    for got, want in zip(mixer(*(kernel_of(op, facts).fn for op in ops)), wanted, strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


SLOT = "slot = tl.load(slots_ptr + row).to(tl.int64)"
CLAMPED = "slot = tl.maximum(tl.load(slots_ptr + row), 0).to(tl.int64)"
FAULTS = [
    ("gated_delta", "(KEY * 1.0)", "(KEY * 1.0 + 1.0)", WARP_64),
    ("gated_delta", "n[:, None] < step, solved", "n[:, None] < step - 1, solved", WARP_64),
    ("gated_delta", SLOT, CLAMPED, None),
    ("gated_delta", "inside & (tl.load(contexts_ptr + row) > 0)", "inside", None),
    ("gated_delta", "head // GROUP * k_head", "head % GROUP * k_head", None),
    ("conv1d_update", "seen = token - (TAPS - 1) + i", "seen = token - TAPS + i", None),
    ("conv1d_update", "(kept + count).to", "(kept + count - 1).to", None),
    ("conv1d_update", SLOT, CLAMPED, None),
    ("index_topk", "bits ^ every, bits | sign", "bits, bits | sign", None),
    ("index_topk", "(nth_equal <= wanted)", "(nth_equal < wanted)", None),
    ("index_topk", "tl.maximum(products, 0.0)", "products", None),
]  # fmt: skip


@pytest.mark.parametrize(("op", "old", "new", "facts"), FAULTS)
def test_a_faulty_source_is_caught(
    op: str, old: str, new: str, facts: DeviceFacts | None, tmp_path: Path
) -> None:
    fn = getattr(with_fault(MODULES[op], old, new, tmp_path), op)
    assert is_caught(OPS[op], partial(fn, tuning.choose(facts or triton_facts())), FEW[op])


INNER_FAULTS = [
    ("latent_attention", "% PAGE_SIZE\n    column", "% PAGE_SIZE * 0\n    column"),
    ("latent_attention", "more = VALUE + tl.arange(0, BLOCK_R)", "more = tl.arange(0, BLOCK_R)"),
    ("latent_attention", "seen = key <= position", "seen = key < position"),
    ("latent_attention", "part < parts, other=0.0", "part < 1, other=0.0"),
    ("compressed_attention", "position - WINDOW + 1", "position - WINDOW"),
    ("compressed_attention", "entry < (position + 1) // RATIO", "entry < position // RATIO"),
    ("compressed_attention", "mask=head < HEADS, other=0.0) * LOG2E", "mask=head < 0, other=0.0)"),
    ("mhc_post", "(row * N + i) * N + J", "(row * N + J) * N + i"),
    ("mhc_pre", "axis=1, keep_dims=True) + eps)", "axis=0, keep_dims=True) + eps)"),
    ("mhc_pre", "2.0 * tl.sigmoid(post)", "tl.sigmoid(post)"),
    ("mhc_head", "squares / (N * width)", "squares / width"),
    ("compress_norm_rope_store", "(position + 1) % RATIO == 0", "position % RATIO == 0"),
    ("compress_norm_rope_store", "first + place >= 0", "first + place >= -99"),
    ("compress_norm_rope_store", "two * cos + one * sin", "two * cos - one * sin"),
    ("compress_norm_rope_store", "+ position % RING * WIDTH", "+ 0 * position * WIDTH"),
    ("inverse_rope_quant", "sign = -sign", "sign = sign"),
    ("inverse_rope_quant", "+ ((bits >> SHIFT) & 1)", ""),
    ("inverse_rope_quant", "((127 - BIAS) << 3)", "(120 << 3)"),
    ("qk_norm_rope_quant", "scale.to(tl.int32, bitcast=True) + 0x7FFFFF", "0x3F800000"),
    ("qk_norm_rope_quant", "mask=last)", "mask=there & (column > REST))"),
    ("qk_norm_rope_quant", "own *= tl.load", "own += 0.0 * tl.load"),
]
INNER = {
    "latent_attention": (vector_attention, "vector_kernels"),
    "compressed_attention": (vector_attention, "vector_kernels"),
    "mhc_post": (hyper_connections, "hyper_kernels"),
    "mhc_pre": (hyper_connections, "hyper_kernels"),
    "mhc_head": (hyper_connections, "hyper_kernels"),
    "compress_norm_rope_store": (compress, "compress_kernels"),
    "inverse_rope_quant": (fp8_rows, "fp8_rows_kernels"),
    "qk_norm_rope_quant": (fp8_rows, "fp8_rows_kernels"),
}
"""Op -> the module that launches, and the one that has its kernels."""


@pytest.mark.parametrize(("op", "old", "new"), INNER_FAULTS)
def test_a_fault_in_a_kernel_is_caught(
    op: str, old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launching, kernels = INNER[op]
    faulty = with_fault(kernels, old, new, tmp_path)
    for name in [name for name in vars(launching) if name.endswith("_kernel")]:
        monkeypatch.setattr(launching, name, getattr(faulty, name))
    assert is_caught(OPS[op], kernel_of(op).fn, FEW[op])


@pytest.mark.parametrize(("tokens", "dtype"), [(2, torch.bfloat16), (33, torch.float16)], ids=str)
def test_the_fused_residual_is_that_of_the_composition(tokens: int, dtype: torch.dtype) -> None:
    """Bit for bit, of two tiles of the table, and in memory of its own."""
    assert tuning.choose(triton_facts()).mhc_few == 32
    torch.manual_seed(0)
    made, streams = torch.randn(tokens, 33).to(dtype), torch.randn(tokens, 2, 33).to(dtype)
    post, mixing = torch.rand(tokens, 2), torch.rand(tokens, 2, 2)
    mixer = torch.randn(8, 2 * 33), torch.randn(8), torch.rand(3)
    before = streams.clone()
    new, *_ = kernel_of("mhc_post_pre").fn(
        made, streams, post, mixing, *mixer, torch.ones(33), 2, 1e-6, 1e-6
    )
    assert torch.equal(new, kernel_of("mhc_post").fn(made, streams, post, mixing))
    assert torch.equal(streams, before)
    assert new.data_ptr() != streams.data_ptr()
    if dtype == torch.float16:
        wanted = generic.GENERIC["mhc_post"](made, streams, post, mixing)
        torch.testing.assert_close(new, wanted, atol=0.0, rtol=2e-3)
