"""More of what is compiled for every target: mixers with a state (the sizes of Qwen3.5 9B)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sixfold.platforms.interface import DeviceFacts
from sixfold.platforms.triton_kernels.tuning import choose

TOKENS = 48
CACHE_BYTES = 3 << 30
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
    state = tensor(CACHE_BYTES // (4 * value * dim * dim), value, dim, dim, dtype=torch.float32)
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


def vectors(ops: dict[str, Any], facts: DeviceFacts) -> dict[str, Callable[[], object]]:
    """Latent attention of DeepSeek-V3, and what DeepSeek-V4 Flash has of it: a window, all entries
    beside one, and selected ones; where the device has kernels for vectors so wide."""
    rows, heads, page = 8, 64, 64
    parts, lse = tensor(TOKENS, heads, 512), tensor(TOKENS, heads, dtype=torch.float32)
    merge = partial(ops["merge_state"], parts, lse, parts, lse)
    work: dict[str, Callable[[], object]] = {"merge_state": merge}
    if choose(facts).vector_dim < 512:
        return work
    for name, tokens in (("decode", rows), ("prefill", 512)):
        slots, starts, contexts = rows_of(rows)
        table = slots.view(rows, 1).expand(rows, 64).contiguous()
        cache = tensor(CACHE_BYTES // 1152, 576)
        work[f"latent_attention {name}"] = partial(
            ops["latent_attention"], tensor(tokens, 128, 576), tensor(tokens, 576), cache, table,
            starts, contexts, page, 512, 0.1,
        )  # fmt: skip
        q, kv, sinks = tensor(tokens, heads, 512), tensor(tokens, 512), tensor(heads).float()
        window = tensor(CACHE_BYTES // 1024, 512)
        asked = (q, kv, sinks, window, table, starts, contexts, page, 128, 0.1)
        entries = {"entries": window, "entry_table": table, "ratio": 128}
        some = {**entries, "ratio": 4, "selected": torch.empty((tokens, 512), dtype=torch.int64)}
        for kind, more in (("selected", some), ("window", {}), ("all entries", entries)):
            if kind != "selected" and name == "prefill":
                continue
            run = partial(ops["compressed_attention"], *asked, **more)
            work[f"compressed_attention {kind}, {name}"] = run
    return work


def streams(ops: dict[str, Any]) -> dict[str, Callable[[], object]]:
    """Hyper-connections of DeepSeek-V4 Flash, for few tokens and for many."""
    count, width, single = 4, 4096, torch.float32
    outputs = (2 + count) * count
    mixer = tensor(outputs, count * width, dtype=single), tensor(outputs, dtype=single)
    scale, norm = tensor(3, dtype=single), tensor(width)
    work: dict[str, Callable[[], object]] = {}
    for name, tokens in (("few", 8), ("many", 512)):
        old, made = tensor(tokens, count, width), tensor(tokens, width)
        post = tensor(tokens, count, dtype=single)
        finished = made, old, post, tensor(tokens, count, count, dtype=single)
        run = partial(ops["mhc_post_pre"], *finished, *mixer, scale, norm, 20, 1e-6, 1e-6)
        work[f"mhc_post_pre {name}"] = run
    head = mixer[0][:count], mixer[1][:count], scale[:1]
    work["mhc_pre"] = partial(ops["mhc_pre"], old, *mixer, scale, 20, 1e-6, 1e-6)
    work["mhc_post"] = partial(ops["mhc_post"], *finished)
    work["mhc_head"] = partial(ops["mhc_head"], old, *head, 1e-6, 1e-6)
    return work


def compressing(ops: dict[str, Any]) -> dict[str, Callable[[], object]]:
    """Entries of DeepSeek-V4: of 4 tokens with those before, of 128, and the indexer's keys."""
    rows, page, single = 8, 256, torch.float32
    work: dict[str, Callable[[], object]] = {}
    for kind, ratio, parts, dim in (("4", 4, 2, 512), ("128", 128, 1, 512), ("index", 4, 2, 128)):
        width = parts * dim
        state = tensor(CACHE_BYTES // (8 * width * 128), parts * ratio, 2 * width, dtype=single)
        cache, weight = tensor(CACHE_BYTES // (2 * dim), dim), tensor(dim, dtype=single)
        for name, tokens in (("decode", rows), ("prefill", 512)):
            if kind != "4" and name == "prefill":
                continue
            slots, starts, contexts = rows_of(rows)
            angles = tensor(tokens, 32, dtype=single)
            work[f"compress {kind}, {name}"] = partial(
                ops["compress_norm_rope_store"], tensor(tokens, 2 * width, dtype=single), state,
                slots, tensor(ratio, width, dtype=single), weight, 1e-6, angles, angles, cache,
                slots.view(rows, 1).expand(rows, 64).contiguous(), starts, contexts, page,
            )  # fmt: skip
    table = integers(rows).view(rows, 1).expand(rows, 512).contiguous()
    _, starts, contexts = rows_of(rows)
    asked = tensor(rows, 64, 128), tensor(rows, 64), tensor(CACHE_BYTES // 256, 128), table
    work["index_topk"] = partial(ops["index_topk"], *asked, starts, contexts, page, 4, 512)
    return work
