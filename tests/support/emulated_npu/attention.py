"""`npu_fused_infer_attention_score` over pages, layout BSH. Page: op-plugin,
`torch_npu-npu_fused_infer_attention_score.md`.

Two branches, by the queries' padded length S. S = 1: no sparse mode has an effect, and a mask is of
(B, keys). S > 1: sparse mode 3 is causal from the lower right corner, 4 a band from there, both
with the lower triangle of 2048 x 2048; pages are 128 to 512 tokens, in steps of 128.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import HALVES, NPUError, contiguous, dtype_of, need, not_emulated

OP = "npu_fused_infer_attention_score"
PAGES = (128, 256, 384, 512)
TRIANGLE = 2048


def npu_fused_infer_attention_score(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    pse_shift: Tensor | None = None,
    atten_mask: Tensor | None = None,
    actual_seq_lengths: Sequence[int] | None = None,
    actual_seq_lengths_kv: Sequence[int] | None = None,
    dequant_scale1: Tensor | None = None,
    quant_scale1: Tensor | None = None,
    dequant_scale2: Tensor | None = None,
    quant_scale2: Tensor | None = None,
    quant_offset2: Tensor | None = None,
    antiquant_scale: Tensor | None = None,
    antiquant_offset: Tensor | None = None,
    key_antiquant_scale: Tensor | None = None,
    key_antiquant_offset: Tensor | None = None,
    value_antiquant_scale: Tensor | None = None,
    value_antiquant_offset: Tensor | None = None,
    block_table: Tensor | None = None,
    query_padding_size: Tensor | None = None,
    kv_padding_size: Tensor | None = None,
    key_shared_prefix: Tensor | None = None,
    value_shared_prefix: Tensor | None = None,
    actual_shared_prefix_len: Sequence[int] | None = None,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    key_rope_antiquant_scale: Tensor | None = None,
    num_heads: int = 1,
    scale: float = 1.0,
    pre_tokens: int = 2147483647,
    next_tokens: int = 2147483647,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    sparse_mode: int = 0,
    inner_precise: int = 0,
    block_size: int = 0,
    antiquant_mode: int = 0,
    softmax_lse_flag: bool = False,
    key_antiquant_mode: int = 0,
    value_antiquant_mode: int = 0,
) -> tuple[Tensor, Tensor]:
    given = dict(locals())
    for name in EMULATED:
        given.pop(name)
    not_emulated(OP, **given)
    need(input_layout == "BSH", OP, f"layout {input_layout} is not emulated")
    if block_table is None or actual_seq_lengths_kv is None:
        raise NPUError(f"{OP}: page attention needs block_table and actual_seq_lengths_kv")
    kv_heads = num_key_value_heads or num_heads
    lengths = [int(n) for n in actual_seq_lengths_kv]
    _check_shapes(query, key, value, num_heads, kv_heads, block_size)
    _check_pages(query, key, block_table, lengths, block_size)
    rows, longest, _ = query.shape
    counts = [longest] * rows if actual_seq_lengths is None else list(actual_seq_lengths)
    need(len(counts) >= rows, OP, f"{len(counts)} query lengths for {rows} rows")
    need(all(0 < n <= longest for n in counts[:rows]), OP, f"query lengths {counts}")
    hidden = _mask(query, atten_mask, sparse_mode, lengths, int(block_table.shape[1]) * block_size)
    out = torch.full_like(query, float("nan"))  # what lies behind a row's queries is not defined
    for row in range(rows):
        k, v = (_keys(x, block_table[row], lengths[row], kv_heads) for x in (key, value))
        q = query[row, : counts[row]].view(counts[row], num_heads, -1)
        seen = hidden(row, counts[row], pre_tokens, next_tokens)
        out[row, : counts[row]] = _attend(q, k, v, scale, seen).flatten(1)
    return out, torch.zeros(1, device=query.device)


def get_max_workspace(query: Tensor, key: Tensor, value: Tensor, **given: Any) -> Tensor:
    """`_npu_fused_infer_attention_score_get_max_workspace`: enough for any lengths. How much is the
    library's secret; here it is told by the shapes, so that another call's is noticed."""
    need(not {"workspace", "out"} & set(given), WORKSPACE, "it takes neither workspace nor out")
    table = given["block_table"]
    return torch.empty(query.numel() + table.numel(), dtype=torch.uint8, device=query.device)


def fused_infer_attention_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    workspace: Tensor | None = None,
    out: Sequence[Tensor],
    **given: Any,
) -> Sequence[Tensor]:
    """`npu_fused_infer_attention_score.out`, by which a graph's tasks are updated. Page:
    `torch_npu-npu-graph_task_update_begin.md`, whose example gives a workspace and two results."""
    if workspace is None:
        raise NPUError(f"{OP}.out: without a workspace it is not shown")
    need(workspace.numel() >= query.numel() + given["block_table"].numel(), OP, "small workspace")
    need(len(out) == 2, OP, f"{len(out)} results, not 2")
    result, lse = npu_fused_infer_attention_score(query, key, value, **given)
    for place, made in zip(out, (result, lse), strict=True):
        need(place.shape == made.shape, OP, f"result {tuple(place.shape)}")
        need(place.dtype == query.dtype, OP, f"result {place.dtype}")
        contiguous(OP, out=place)
        place.copy_(made)
    return out


WORKSPACE = "_npu_fused_infer_attention_score_get_max_workspace"
EMULATED = (
    "query key value atten_mask actual_seq_lengths actual_seq_lengths_kv block_table num_heads "
    "scale pre_tokens next_tokens input_layout num_key_value_heads sparse_mode block_size"
).split()


def _keys(cache: Tensor, table: Tensor, length: int, kv_heads: int) -> Tensor:
    pages = table[: -(-length // cache.shape[1])].long()
    return cache[pages].flatten(0, 1)[:length].unflatten(-1, (kv_heads, -1))


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, seen: Tensor) -> Tensor:
    """Keys out of sight have weight 0 and are multiplied by it, as kernels do."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(group, dim=1) for x in (k, v))
    logits = torch.einsum("qhd,khd->hqk", q.float(), k) * scale
    weights = torch.where(seen, logits, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)


def _check_shapes(
    query: Tensor, key: Tensor, value: Tensor, heads: int, kv_heads: int, block_size: int
) -> None:
    dtype_of(OP, "query", query, HALVES)
    need(key.dtype == query.dtype == value.dtype, OP, "query, key and value are of one dtype")
    contiguous(OP, query=query, key=key, value=value)
    need(query.dim() == 3, OP, f"BSH is three axes, query has {query.dim()}")
    need(key.dim() == 3, OP, f"pages for BSH are (blocks, block size, H), not {tuple(key.shape)}")
    need(key.shape == value.shape, OP, "key and value differ in shape")
    need(heads <= 256 and heads % kv_heads == 0, OP, f"{heads} heads over {kv_heads}")
    need(heads // kv_heads <= 64, OP, f"{heads // kv_heads} heads share a kv head, at most 64")
    need(query.shape[2] % heads == 0, OP, f"H {query.shape[2]} is not heads {heads} times D")
    dim = query.shape[2] // heads
    need(dim % 16 == 0 and dim <= 512, OP, f"D is a multiple of 16 up to 512, not {dim}")
    need(key.shape[1:] == (block_size, kv_heads * dim), OP, f"pages are {tuple(key.shape)}")
    need(kv_heads * dim <= 65535, OP, "KV_N * D is above 65535")


def _check_pages(
    query: Tensor, key: Tensor, table: Tensor, lengths: list[int], block_size: int
) -> None:
    need(block_size in PAGES, OP, f"block_size {block_size} is not one of {PAGES}")
    need(table.dtype == torch.int32 and table.dim() == 2, OP, "block_table is int32 of two axes")
    need(len(table) == len(query), OP, f"block_table has {len(table)} rows, B is {len(query)}")
    need(len(lengths) == len(query), OP, f"{len(lengths)} key lengths for {len(query)} rows")
    counts = [-(-n // block_size) for n in lengths]
    need(min(lengths) > 0, OP, "a row without keys is not documented")
    need(table.shape[1] >= max(counts), OP, "block_table is narrower than the longest row")
    for row, count in enumerate(counts):
        # The device does not look, and reads whatever is there.
        listed = table[row, :count]
        need(bool(((listed >= 0) & (listed < len(key))).all()), OP, "a block that is not there")


def _mask(
    query: Tensor, mask: Tensor | None, sparse_mode: int, lengths: list[int], width: int
) -> Any:
    """row, queries, pre, next -> bool (queries, keys) of what is seen."""
    if query.shape[1] == 1:
        need(sparse_mode == 0, OP, "a sparse mode has no effect for single queries")
        if mask is not None:
            need(mask.dtype in MASKS, OP, f"masks are bool, int8 or uint8, not {mask.dtype}")
            contiguous(OP, atten_mask=mask)
            need(tuple(mask.shape) == (len(query), width), OP, f"mask {tuple(mask.shape)}")
        return lambda row, count, before, behind: (
            torch.ones(1, lengths[row], dtype=torch.bool)
            if mask is None
            else ~mask[row : row + 1, : lengths[row]].bool()
        )
    need(sparse_mode in (3, 4), OP, f"sparse mode {sparse_mode} is not emulated for many queries")
    whole = mask is not None and mask.shape[-2:] == (TRIANGLE, TRIANGLE) and mask.dim() <= 4
    need(whole, OP, f"sparse mode {sparse_mode} needs a mask of {TRIANGLE} x {TRIANGLE}")
    if mask is not None:
        need(mask.dtype in MASKS, OP, f"masks are bool, int8 or uint8, not {mask.dtype}")
        upper = torch.ones(TRIANGLE, TRIANGLE, dtype=torch.bool).triu(1)
        need(torch.equal(mask.bool().view(TRIANGLE, TRIANGLE), upper), OP, "not a lower triangle")
    return lambda row, count, before, behind: _band(
        count, lengths[row], *((2**31, 0) if sparse_mode == 3 else (before, behind))
    )


MASKS = (torch.bool, torch.int8, torch.uint8)


def _band(queries: int, keys: int, before: int, behind: int) -> Tensor:
    """From the lower right corner: the last query is at the last key."""
    need(keys >= queries, OP, f"{queries} queries and {keys} keys leave rows that see nothing")
    at = torch.arange(keys - queries, keys).unsqueeze(1) - torch.arange(keys)
    return (at <= before) & (at >= -behind)
