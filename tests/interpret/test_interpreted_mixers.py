"""Guards law 8 for the Triton kernels of mixers: in Triton's interpreter they pass their contracts,
cut for 32 and for 64 lanes (a few cases of each; all with --all-cases), and faults are caught."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.interpreted_cases import CUT_BY_LANES, FEW
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
from sixfold.platforms.triton_kernels import tuning, vector_attention
from sixfold.platforms.triton_kernels.register import OPS as MODULES

FACTS = [triton_facts(), WARP_64]


def kernel_of(op: str, facts: DeviceFacts | None = None) -> Any:
    return next(k for k in triton_registry(facts).kernels() if k.op == op)


@pytest.mark.parametrize(
    ("op", "facts"),
    [*((op, FACTS[0]) for op in FEW), *((op, WARP_64) for op in CUT_BY_LANES)],
    ids=lambda x: x if isinstance(x, str) else f"{x.lane_width}_lanes",
)
def test_kernel_equals_its_reference(
    op: str, facts: DeviceFacts, request: pytest.FixtureRequest
) -> None:
    complete = request.config.getoption("--all-cases")
    names = () if complete else FEW[op]
    verdict = verdict_on(OPS[op], names, kernel_of(op, facts).fn, "float32")
    assert verdict.status == "pass", verdict
    if complete:
        verdict = verdict_on(OPS[op], (), kernel_of(op, facts).fn, "float16")
        assert verdict.status == "pass", verdict


@pytest.mark.parametrize("op", FEW)
def test_sixteen_bits(op: str) -> None:
    verdict = verdict_on(OPS[op], FEW[op][:1], kernel_of(op).fn, "float16")
    assert verdict.status == "pass", verdict


def test_the_gated_delta_rule_has_its_chunks_on_64_lanes_only() -> None:
    """So that both forms are tested above."""
    cuts = [tuning.choose(facts).delta.block_m for facts in FACTS]
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
]  # fmt: skip


@pytest.mark.parametrize(("op", "old", "new", "facts"), FAULTS)
def test_a_faulty_source_is_caught(
    op: str, old: str, new: str, facts: DeviceFacts | None, tmp_path: Path
) -> None:
    fn = getattr(with_fault(MODULES[op], old, new, tmp_path), op)
    assert is_caught(OPS[op], partial(fn, tuning.choose(facts or triton_facts())), FEW[op])


VECTOR_FAULTS = [
    (
        "latent_attention",
        "position % PAGE_SIZE\n    column",
        "position % PAGE_SIZE * 0\n    column",
    ),
    ("latent_attention", "more = VALUE + tl.arange(0, BLOCK_R)", "more = tl.arange(0, BLOCK_R)"),
    ("latent_attention", "seen = key <= position", "seen = key < position"),
    ("latent_attention", "part < parts, other=0.0", "part < 1, other=0.0"),
    ("compressed_attention", "position - WINDOW + 1", "position - WINDOW"),
    ("compressed_attention", "entry < (position + 1) // RATIO", "entry < position // RATIO"),
    ("compressed_attention", "entry * RATIO + RATIO - 1", "entry * RATIO"),
    ("compressed_attention", "mask=head < HEADS, other=0.0) * LOG2E", "mask=head < 0, other=0.0)"),
]


@pytest.mark.parametrize(("op", "old", "new"), VECTOR_FAULTS)
def test_a_fault_in_vector_attention_is_caught(
    op: str, old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty = with_fault("vector_kernels", old, new, tmp_path)
    for name in ("store_kernel", "vector_attention_kernel", "vector_merge_kernel"):
        monkeypatch.setattr(vector_attention, name, getattr(faulty, name))
    assert is_caught(OPS[op], kernel_of(op).fn, FEW[op])
