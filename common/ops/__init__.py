"""Every op of the engine: its meaning in numpy, its test cases, its tolerances."""

from __future__ import annotations

from ...platforms.interface_kernels import Op
from . import activation, attention, dense, logprobs, moe, norm, paging, rope, sample

OPS: dict[str, Op] = {
    op.name: op
    for module in (dense, norm, rope, activation, moe, paging, attention, sample, logprobs)
    for op in module.OPS
}
