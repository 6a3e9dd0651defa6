"""Stand-ins for vendors' libraries on the CPU, behind the names and parameters of the real ones.

They compute row by row what the library's documentation says, and refuse what it refuses. What they
show is that an adapter calls the library as it is declared and means the right keys; nothing of the
library's own kernels runs. Sources: flashinfer-python 0.7.2.post1, `flashinfer/decode.py` and
`flashinfer/prefill.py`; amd-aiter 0.1.7, `aiter/ops/rmsnorm.py` and
`aiter/ops/triton/unified_attention.py`.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the time of a test, `import flashinfer` and `import aiter` give the stand-ins."""
    flashinfer, aiter = ModuleType("flashinfer"), ModuleType("aiter")
    for wrapper in (BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper):
        setattr(flashinfer, wrapper.__name__, wrapper)
    for function in (rmsnorm2d_fwd, rmsnorm2d_fwd_with_add):
        setattr(aiter, function.__name__, function)
    attention = ModuleType("aiter.ops.triton.unified_attention")
    attention.unified_attention = unified_attention  # type: ignore[attr-defined]
    modules = {"flashinfer": flashinfer, "aiter": aiter, attention.__name__: attention}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window_left: int,
    cap: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """q (n, heads, dim) are the last n positions of k, v (L, kv_heads, dim). Keys out of sight get
    weight 0 and are multiplied by it, as kernels do."""
    count, keys = len(q), len(k)
    k, v = (x.float().repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    logits = torch.einsum("qhd,khd->hqk", q.float(), k) * scale
    if cap:
        logits = cap * torch.tanh(logits / cap)
    distance = torch.arange(keys - count, keys).unsqueeze(1) - torch.arange(keys)
    seen = (distance >= 0) & ((distance <= window_left) | (window_left < 0))
    logits = torch.where(seen, logits, -torch.inf)
    if sinks is not None:
        logits = torch.cat((logits, sinks.view(-1, 1, 1).expand(-1, count, 1)), dim=-1)
    weights = logits.softmax(-1)[..., :keys]
    return torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)


class _Paged:
    """What both wrappers keep of a plan."""

    device: torch.device

    def _keep(
        self, start: Tensor, pages: Tensor, last: Tensor, heads: tuple[int, ...], page_size: int
    ) -> None:
        for part in (start, pages, last):
            if part.dtype != torch.int32:
                raise ValueError(f"page indices are int32, not {part.dtype}")
        self.start, self.pages, self.last = (x.to(self.device) for x in (start, pages, last))
        self.heads, self.page_size = heads, page_size
        if isinstance(last, FakeTensor):
            return  # a trace has no values
        if not bool(((last >= 1) & (last <= page_size)).all()):
            raise ValueError(f"1 <= paged_kv_last_page_len <= page_size, got {last.tolist()}")
        if int(start[-1]) > len(pages) or len(start) != len(last) + 1:
            raise ValueError("indptr does not fit indices or last_page_len")

    def _rows(
        self, q: Tensor, query_start: list[int], cache: Any, options: dict[str, Any]
    ) -> Tensor:
        keys, values = cache
        if keys.shape[1] != self.page_size or keys.stride() != values.stride():
            raise ValueError("keys and values are (pages, page_size, heads, dim), strides equal")
        if (q.shape[1], keys.shape[2], q.shape[2]) != self.heads:
            raise ValueError(f"heads are {self.heads} in the plan")
        parts = []
        for row, length in enumerate(self.last.tolist()):
            listed = self.pages[int(self.start[row]) : int(self.start[row + 1])].long()
            count = (len(listed) - 1) * self.page_size + length
            k, v = (x[listed].flatten(0, 1)[:count] for x in (keys, values))
            mine = q[query_start[row] : query_start[row + 1]]
            cap = options["logits_soft_cap"] or 0.0
            parts.append(attend(mine, k, v, options["sm_scale"], options["window_left"], cap))
        return torch.cat(parts)


class BatchDecodeWithPagedKVCacheWrapper(_Paged):
    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: Tensor | None = None,
        paged_kv_indices_buffer: Tensor | None = None,
        paged_kv_last_page_len_buffer: Tensor | None = None,
        backend: str = "auto",
        jit_args: Any = None,
    ) -> None:
        self.device = float_workspace_buffer.device
        if kv_layout != "NHD":
            raise ValueError("this stand-in has the layout NHD")
        self.buffers = None
        if use_cuda_graph:
            given = (
                paged_kv_indptr_buffer,
                paged_kv_indices_buffer,
                paged_kv_last_page_len_buffer,
            )
            if any(buffer is None for buffer in given):
                raise ValueError("buffers should be tensors in cudagraph mode")
            self.buffers = given
        self.planned: dict[str, Any] = {}

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: Any = "float16",
        kv_data_type: Any = None,
        sm_scale: float | None = None,
    ) -> None:
        if self.buffers is not None:
            start, pages, last = self.buffers
            if len(last_page_len) != len(last):
                raise ValueError("The batch size should be fixed in cudagraph mode")
            if len(indices) > len(pages):
                raise ValueError("The size of indices should be at most that of the buffer")
            start.copy_(indptr)
            pages[: len(indices)].copy_(indices)
            last.copy_(last_page_len)
            indptr, indices, last_page_len = start, pages, last
        heads = (num_qo_heads, num_kv_heads, head_dim)
        self._keep(indptr, indices, last_page_len, heads, page_size)
        self.planned = {
            "window_left": window_left,
            "logits_soft_cap": logits_soft_cap,
            "sm_scale": sm_scale,
        }

    def run(self, q: Tensor, paged_kv_cache: Any) -> Tensor:
        if len(q) != len(self.last):
            raise ValueError(f"one query for each of {len(self.last)} rows, got {len(q)}")
        return self._rows(q, list(range(len(q) + 1)), paged_kv_cache, self.planned)


class BatchPrefillWithPagedKVCacheWrapper(_Paged):
    def __init__(
        self, float_workspace_buffer: Tensor, kv_layout: str = "NHD", backend: str = "auto"
    ) -> None:
        self.device = float_workspace_buffer.device
        if kv_layout != "NHD":
            raise ValueError("this stand-in has the layout NHD")

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: Any = "float16",
        kv_data_type: Any = None,
    ) -> None:
        if not causal:
            raise ValueError("this stand-in is causal")
        heads = (num_qo_heads, num_kv_heads, head_dim_qk)
        self._keep(paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, heads, page_size)
        self.query_start = qo_indptr.to(self.device)
        self.planned = {
            "window_left": window_left,
            "logits_soft_cap": logits_soft_cap,
            "sm_scale": sm_scale,
        }

    def run(self, q: Tensor, paged_kv_cache: Any) -> Tensor:
        return self._rows(q, self.query_start.tolist(), paged_kv_cache, self.planned)


def rmsnorm2d_fwd(
    input: Tensor, weight: Tensor, epsilon: float, use_model_sensitive_rmsnorm: int = 0
) -> Tensor:
    if input.dim() != 2 or not input.is_contiguous() or weight.dtype != input.dtype:
        raise ValueError("a contiguous matrix, and a weight of its dtype")
    wide = input.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return (wide * scale * weight.float()).to(input.dtype)


def rmsnorm2d_fwd_with_add(
    out: Tensor,
    input: Tensor,
    residual_in: Tensor,
    residual_out: Tensor,
    weight: Tensor,
    epsilon: float,
    use_model_sensitive_rmsnorm: int = 0,
) -> None:
    residual_out.copy_(input + residual_in)
    out.copy_(rmsnorm2d_fwd(residual_out, weight, epsilon))


def unified_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    seqused_k: Tensor,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    block_table: Tensor,
    softcap: float,
    q_descale: Any,
    k_descale: Any,
    v_descale: Any,
    alibi_slopes: Any = None,
    output_scale: Any = None,
    qq_bias: Any = None,
    sinks: Tensor | None = None,
) -> None:
    if not causal or int(seqused_k.max()) > max_seqlen_k:
        raise ValueError("causal, and no row longer than max_seqlen_k")
    start = cu_seqlens_q.tolist()
    if max(b - a for a, b in pairwise(start)) > max_seqlen_q:
        raise ValueError("no row has more queries than max_seqlen_q")
    for row, keys in enumerate(seqused_k.tolist()):
        pages = block_table[row, : -(-keys // k.shape[1])].long()
        mine = slice(start[row], start[row + 1])
        past = (x[pages].flatten(0, 1)[:keys] for x in (k, v))
        out[mine] = attend(q[mine], *past, softmax_scale, window_size[0], softcap, sinks)
