"""Contract: MultiAxisRope gives transformers' Qwen3.5 angles for three axes of positions, and
Rope's for one; what it has no rule for is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.kernel_checks import cpu_facts, cpu_registry
from support.tiny_qwen3_5 import TEXT
from transformers import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5TextRotaryEmbedding

from sixfold.common.checkpoint.fields import Fields
from sixfold.common.errors import CheckpointError
from sixfold.models.layers import Build
from sixfold.models.rope import MultiAxisRope, Rope, rope_settings
from sixfold.platforms.interface_kernels import KernelTable, Problem

PUBLISHED = {"partial_rotary_factor": 0.25, "rope_theta": 1e7, "mrope_section": [11, 11, 10]}
SIZES: dict[str, tuple[int, dict[str, Any]]] = {
    "tiny": (32, {}),
    "published": (256, PUBLISHED),
    "unequal": (64, {"partial_rotary_factor": 1.0, "mrope_section": [20, 4, 8]}),
}


def settings(**changes: Any) -> Fields:
    fields = Fields({"rope_parameters": {**TEXT["rope_parameters"], **changes}}, Path("c.json"))
    return rope_settings(fields)


def native(half: int) -> KernelTable:
    problems = [Problem("rope_angles", "float32", {"half": half})]
    return cpu_registry().resolve(problems, cpu_facts(), {})


@pytest.mark.parametrize("name", SIZES)
def test_angles_equal_transformers(name: str, table: KernelTable) -> None:
    head_dim, changes = SIZES[name]
    rope_parameters = {**TEXT["rope_parameters"], **changes}
    config = Qwen3_5TextConfig(**{**TEXT, "head_dim": head_dim, "rope_parameters": rope_parameters})
    positions = torch.randint(0, 3000, (3, 17), generator=torch.Generator().manual_seed(1))
    cos, sin = Qwen3_5TextRotaryEmbedding(config)(torch.zeros(1), positions[:, None])
    for ops in (table, native(cos.shape[-1] // 2)):
        rope = MultiAxisRope(settings(**changes), head_dim, Build(ops, torch.float32))
        half = rope.rotary_dim // 2
        for found, wanted in zip(rope(positions), (cos, sin), strict=True):
            torch.testing.assert_close(found, wanted[0, :, :half], atol=2e-5, rtol=0)
    one, other = rope(positions), rope(positions[[0, 2, 1]])
    assert not torch.equal(one[0], other[0])  # the axes are told apart


def test_equal_axes_are_plain_rotary(table: KernelTable) -> None:
    build = Build(table, torch.float32)
    positions = torch.tensor([0, 7, 4095, 3])
    plain = Rope(settings(), 32, build)(positions)
    rope = MultiAxisRope(settings(), 32, build)
    for given in (positions, positions.expand(3, -1)):
        for found, wanted in zip(rope(given), plain, strict=True):
            assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    "changes", [{"mrope_interleaved": False}, {"mrope_section": [11, 11]}], ids=str
)
def test_other_rules_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=next(iter(changes))):
        MultiAxisRope(settings(**changes), 32, Build(KernelTable({}, ()), torch.float32))
