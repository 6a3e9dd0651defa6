"""Guards what device graphs need of the Triton kernels that follow a step's rows: what is launched
depends on shapes alone, and no wrapper reads a tensor on the host. Nothing is interpreted here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.recorded_launches import Launch, record_launches
from support.triton_checks import WARP_64, triton_facts, triton_registry

from sixfold.common.ops import OPS
from sixfold.common.ops.suite import is_stored, problem_of
from sixfold.platforms.interface import DeviceFacts
from sixfold.platforms.triton_kernels import experts, gated_delta

LAUNCHING = {
    "gated_delta": "mixed",
    "conv1d_update": "mixed",
    "latent_attention": "mixed",
    "compressed_attention": "mixed_selected",
    "index_topk": "mixed",
    "compress_norm_rope_store": "mixed",
    "mhc_post_pre": "beyond_a_tile",
    "moe": "top_8",
    "moe_experts": "sloped_and_biased",
    "moe_experts/mxfp4": "clamped_and_biased",
}
"""Title of a contract -> one of its cases."""
READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")


def launches(
    title: str, facts: DeviceFacts, shift: int, monkeypatch: pytest.MonkeyPatch
) -> list[Launch]:
    """Of a case whose whole numbers are all raised by `shift`."""
    op = OPS[title]
    case = next(c for c in op.cases(np.random.default_rng(0)) if c.name == LAUNCHING[title])
    kernel = next(k for k in triton_registry(facts).kernels() if k.op == op.name)
    args: dict[str, Any] = {}
    for key, value in case.args.items():
        if isinstance(value, np.ndarray):
            args[key] = torch.from_numpy(value + (shift if value.dtype.kind == "i" else 0))
        elif is_stored(value) and kernel.prepare is not None:
            args[key] = kernel.prepare(value, problem_of(op, case, "float32"))
        else:
            args[key] = value
    with monkeypatch.context() as patch:
        log = record_launches(patch)
        for read in READS:
            patch.setattr(torch.Tensor, read, refuse)
        kernel.fn(**args)
    return log


def refuse(*_: Any) -> None:
    raise AssertionError("a tensor is read on the host")


@pytest.mark.parametrize("facts", [triton_facts(), WARP_64], ids=lambda f: f"{f.lane_width}_lanes")
@pytest.mark.parametrize("op", LAUNCHING)
def test_launches_follow_from_shapes(
    op: str, facts: DeviceFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = launches(op, facts, 0, monkeypatch)
    assert once
    assert once == launches(op, facts, 1, monkeypatch)


def test_a_read_on_the_host_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def reading(tuning: Any, *args: Any, **named: Any) -> None:
        named["slots"].tolist()

    monkeypatch.setattr(gated_delta, "gated_delta", reading)
    with pytest.raises(AssertionError, match="read on the host"):
        launches("gated_delta", triton_facts(), 0, monkeypatch)


def test_a_grid_cut_by_counts_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many tiles as experts were chosen, and not as any routing can need."""
    product = experts._product

    def counting(tuning: Any, x: Any, stack: Any, bias: Any, chosen: Any, *rest: Any, **form: Any):
        busy = int((chosen.starts.diff() > 0).sum())
        product(tuning, x[:busy], stack, bias, chosen, *rest, **form)

    monkeypatch.setattr(experts, "_product", counting)
    with pytest.raises(AssertionError, match="read on the host"):
        launches("moe_experts", triton_facts(), 0, monkeypatch)
