"""One kernel of five ops, each off by one, put in the place of the right one as it is registered;
so that `sixfold check` meets it as it would meet a fault of the platform's own.

The kernels to break are the generic ones, or those of Triton, whose source is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from sixfold.common.ops.registry import KernelRegistry
from sixfold.platforms.interface_kernels import Kernel
from sixfold.platforms.torch_runtime import attention, kernels

Breaks = Mapping[str, Callable[..., Any]]
"""Op -> the function that takes the place of its kernel."""


def register_broken(monkeypatch: pytest.MonkeyPatch, provider: str, broken: Breaks) -> None:
    """Whoever registers a kernel of `provider` for one of these ops registers the broken one."""
    add = KernelRegistry.add

    def adding(self: KernelRegistry, kernel: Kernel) -> None:
        if kernel.provider == provider and kernel.op in broken:
            kernel = replace(kernel, fn=broken[kernel.op])
        add(self, kernel)

    monkeypatch.setattr(KernelRegistry, "add", adding)


def norm_over_one_less(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    mean = x.float().pow(2).sum(-1, keepdim=True) / max(1, x.shape[-1] - 1)
    return (x.float() * torch.rsqrt(mean + eps) * weight).to(x.dtype)


def rope_one_position_on(q: Any, k: Any, cos: torch.Tensor, sin: torch.Tensor) -> Any:
    return kernels.rope(q, k, cos.roll(1, 0), sin.roll(1, 0))


def sample_without_the_last_token(logits: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
    logits = logits.clone()
    logits[:, -1:] = -torch.inf
    return kernels.sample(logits, *rest, **more)


def write_one_slot_on(keys: torch.Tensor, values: Any, slots: torch.Tensor, k: Any, v: Any) -> Any:
    return kernels.kv_write(keys, values, (slots + 1) % len(keys), k, v)


GENERIC: Breaks = {
    "rms_norm": norm_over_one_less,
    "rope": rope_one_position_on,
    "sample": sample_without_the_last_token,
    "kv_write": write_one_slot_on,
}


def break_generic(monkeypatch: pytest.MonkeyPatch) -> None:
    """And generic attention, whose rows of one token do not see their last key."""
    register_broken(monkeypatch, "generic", GENERIC)
    gather = attention._decode

    def decode(block: Any, *rest: Any) -> torch.Tensor:
        block.last -= 1
        if block.bias is not None:
            block.bias = block.bias[..., :-1]
        return gather(block, *rest)

    monkeypatch.setattr(attention, "_decode", decode)
