"""Guards what device graphs need of the Triton kernels that follow a step's rows: what is launched
depends on shapes alone, and no wrapper reads a tensor on the host. Nothing is interpreted here."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from support.triton_checks import WARP_64, triton_facts, triton_registry

from sixfold.common.ops import OPS
from sixfold.platforms.interface import DeviceFacts
from sixfold.platforms.triton_kernels import (
    compress,
    gated_delta,
    hyper_connections,
    index_topk,
    short_conv,
    vector_attention,
)

LAUNCHING: dict[str, tuple[ModuleType, str]] = {
    "gated_delta": (gated_delta, "mixed"),
    "conv1d_update": (short_conv, "mixed"),
    "latent_attention": (vector_attention, "mixed"),
    "compressed_attention": (vector_attention, "mixed_selected"),
    "index_topk": (index_topk, "mixed"),
    "compress_norm_rope_store": (compress, "mixed"),
    "mhc_post_pre": (hyper_connections, "beyond_a_tile"),
}
READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")


class Recorder:
    """Stands in for a kernel: notes how it is launched and runs nothing."""

    def __init__(self, name: str, log: list[Any]) -> None:
        self.name, self.log = name, log

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **named: Any) -> None:
            seen = [tuple(a.shape) if isinstance(a, torch.Tensor) else a for a in args]
            self.log.append((self.name, grid, seen, named))

        return launch


def launches(op: str, facts: DeviceFacts, shift: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Of a case whose whole numbers are all raised by `shift`."""
    module, name = LAUNCHING[op]
    case = next(c for c in OPS[op].cases(np.random.default_rng(0)) if c.name == name)
    args: dict[str, Any] = {}
    for key, value in case.args.items():
        if isinstance(value, np.ndarray):
            args[key] = torch.from_numpy(value + (shift if value.dtype.kind == "i" else 0))
        else:
            args[key] = value
    fn = next(k.fn for k in triton_registry(facts).kernels() if k.op == op)
    log: list[Any] = []
    with monkeypatch.context() as patch:
        for kernel in [kernel for kernel in vars(module) if kernel.endswith("_kernel")]:
            patch.setattr(module, kernel, Recorder(kernel, log))
        for read in READS:
            patch.setattr(torch.Tensor, read, refuse)
        fn(**args)
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
