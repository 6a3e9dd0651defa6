"""`npu_scatter_pa_kv_cache`, the second of its scenes: (tokens, heads, dim) into caches of (blocks,
block size, heads, dim). Page: op-plugin, `torch_npu-npu_scatter_pa_kv_cache.md`. The registered
schema also has `cache_mode`, whose default is the blocked order of the first scene; only "Norm" is
emulated."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import FLOATS, contiguous, dtype_of, need, not_emulated

OP = "npu_scatter_pa_kv_cache"


def npu_scatter_pa_kv_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    compress_lens: Tensor | None = None,
    compress_seq_offsets: Tensor | None = None,
    seq_lens: Tensor | None = None,
    cache_mode: str | None = "PA_NZ",
) -> None:
    not_emulated(
        OP, compress_lens=compress_lens, compress_seq_offsets=compress_seq_offsets,
        seq_lens=seq_lens,
    )  # fmt: skip
    need(cache_mode == "Norm", OP, f"cache_mode {cache_mode} is not emulated")
    dtype_of(OP, "key", key, (*FLOATS, torch.int8))
    one = key.dtype == value.dtype == key_cache.dtype == value_cache.dtype
    need(one, OP, "key, value and both caches are of one dtype")
    contiguous(
        OP, key=key, value=value, key_cache=key_cache, value_cache=value_cache,
        slot_mapping=slot_mapping,
    )  # fmt: skip
    need(key.dim() == value.dim() == 3, OP, "key and value are (tokens, heads, dim)")
    need(key.shape[:2] == value.shape[:2], OP, "key and value differ in tokens or heads")
    for new, cache in ((key, key_cache), (value, value_cache)):
        need(cache.dim() == 4, OP, f"caches have four axes, not {cache.dim()}")
        need(cache.shape[2:] == new.shape[1:], OP, f"{tuple(new.shape)} into {tuple(cache.shape)}")
    need(slot_mapping.dtype in (torch.int32, torch.int64), OP, f"slots are {slot_mapping.dtype}")
    need(tuple(slot_mapping.shape) == (len(key),), OP, "one slot for each token")
    slots = slot_mapping.long()
    count = key_cache.shape[0] * key_cache.shape[1]
    inside = bool(((slots >= 0) & (slots < count)).all())
    need(inside, OP, f"slots are 0 to {count - 1}")
    need(len(slots.unique()) == len(slots), OP, "slots are not unique: what is kept is undefined")
    key_cache.flatten(0, 1)[slots] = key
    value_cache.flatten(0, 1)[slots] = value
