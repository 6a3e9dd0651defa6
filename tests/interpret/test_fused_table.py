"""Guards the counts of ci/fused_table.py: launches, bytes and their floor of kernels whose traffic
is known, and torch's operations without views."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from support.triton_checks import triton_registry

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "ci"))
import fused_table

OPS = {kernel.op: kernel.fn for kernel in triton_registry().kernels()}


def test_a_pointwise_kernel_moves_its_floor() -> None:
    gate, up = torch.randn(3, 33), torch.randn(3, 33)
    with fused_table.watching() as traffic:
        out = OPS["silu_mul"](gate, up)
    assert (traffic.launches, traffic.moved()) == (1, 3 * 3 * 33 * 4)
    assert traffic.floor([gate, up, out]) == traffic.moved()
    assert traffic.floor([gate, up]) == 2 * 3 * 33 * 4


def test_what_is_read_again_is_beyond_the_floor() -> None:
    """Every row reads the weight."""
    x, weight = torch.randn(70, 64), torch.randn(64)
    with fused_table.watching() as traffic:
        out = OPS["rms_norm"](x, weight, 1e-6)
    assert traffic.floor([x, weight, out]) == (2 * 70 * 64 + 64) * 4
    assert traffic.moved() > traffic.floor([x, weight, out])


def test_views_and_allocations_are_no_operations() -> None:
    with fused_table.Counted() as counted:
        x = torch.empty(4, 4).view(16)[2:6].unsqueeze(0)
        x.add_(1).mul(2)
    assert counted.count == 2
