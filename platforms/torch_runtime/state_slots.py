"""Slots of a step's rows, for kernels that write states in place with shapes that do not depend on
values: rows that must not write, write back what an idle slot holds."""

from __future__ import annotations

import torch
from torch import Tensor


def idle_slot(slots: Tensor, count: int) -> Tensor:
    """(1,) int64: of `count` slots, one that no row has. slots (R,) int, -1 = padding."""
    taken = torch.zeros(count + 1, dtype=torch.int32, device=slots.device)
    # Padding takes the place behind the last slot.
    taken.index_fill_(0, torch.where(slots < 0, count, slots.long()), 1)
    return taken[:-1].argmin(dim=0, keepdim=True)
