"""More of what is compiled for every target: mixers with a state (the sizes of Qwen3.5 9B)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

STATE_BYTES = 3 << 30
"""More than 2 GiB: what fits 32-bit offsets is compiled otherwise on AMD."""


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def integers(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.int32)


def rows_of(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """slots, query_start, context_lens."""
    return integers(count), integers(count + 1), integers(count)


def recurrent(ops: dict[str, Any]) -> dict[str, Callable[[], object]]:
    """A step of rows that decode, and one with longer rows."""
    rows, key, value, dim = 8, 16, 32, 128
    state = tensor(STATE_BYTES // (4 * value * dim * dim), value, dim, dim, dtype=torch.float32)
    per_head = [tensor(value, dtype=torch.float32) for _ in range(2)]
    work: dict[str, Callable[[], object]] = {}
    for name, tokens in (("decode", rows), ("prefill", 512)):
        q, k = (tensor(tokens, key, dim) for _ in range(2))
        a, b = (tensor(tokens, value) for _ in range(2))
        work[f"gated_delta {name}"] = partial(
            ops["gated_delta"], q, k, tensor(tokens, value, dim), a, b, *per_head, state,
            *rows_of(rows),
        )  # fmt: skip
        x = tensor(tokens, 2 * key * dim + value * dim)
        kept = tensor(state.shape[0], 3, x.shape[1])
        work[f"conv1d_update {name}"] = partial(
            ops["conv1d_update"], x, tensor(x.shape[1], 4), None, kept, *rows_of(rows), True
        )
    return work
