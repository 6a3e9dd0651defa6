"""`torch_npu` for fake tensors: of each op the shapes, dtypes and device of its results, after its
page. What an op is given is on one device; values there are none."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .checks import need


def npu_rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    rows = (*x.shape[: x.dim() - gamma.dim()], *[1] * gamma.dim())
    return torch.empty_like(x), x.new_empty(rows, dtype=torch.float32)


def npu_add_rms_norm(
    x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    normed, rstd = npu_rms_norm(x1, gamma, epsilon)
    return normed, rstd, torch.empty_like(x2)


def npu_swiglu(x: Tensor, dim: int = -1) -> Tensor:
    shape = list(x.shape)
    shape[dim] //= 2
    return x.new_empty(shape)


def npu_rotary_mul(x: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half") -> Tensor:
    torch.broadcast_shapes(x.shape, r1.shape, r2.shape)
    return torch.empty_like(x)


def npu_top_k_top_p(logits: Tensor, p: Tensor, k: Tensor) -> Tensor:
    need(p.shape == k.shape == logits.shape[:1], "npu_top_k_top_p", "a p and a k for each row")
    return torch.empty_like(logits)


def npu_scatter_pa_kv_cache(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor, **given: Any
) -> None:
    need(tuple(slots.shape) == (len(key),), "npu_scatter_pa_kv_cache", "one slot for each token")


def npu_fused_infer_attention_score(
    query: Tensor, key: Tensor, value: Tensor, **given: Any
) -> tuple[Tensor, Tensor]:
    rows = len(given["actual_seq_lengths_kv"])
    need(len(query) == rows == len(given["block_table"]), "npu_fused_infer_attention_score", "rows")
    return torch.empty_like(query), query.new_empty(1)


def fused_infer_attention_out(*, out: Any, workspace: Tensor, **given: Any) -> Any:
    results = npu_fused_infer_attention_score(**given)
    shapes = [[tuple(tensor.shape) for tensor in group] for group in (out, results)]
    need(shapes[0] == shapes[1], "npu_fused_infer_attention_score.out", f"results {shapes}")
    return out


def get_max_workspace(query: Tensor, key: Tensor, value: Tensor, **given: Any) -> Tensor:
    return query.new_empty(64, dtype=torch.uint8)


def npu_grouped_matmul(x: Any, weight: Any, *, group_list: Tensor, **given: Any) -> list[Tensor]:
    return [x[0].new_empty((x[0].shape[0], weight[0].shape[-1]))]


OPS = (
    npu_add_rms_norm, npu_fused_infer_attention_score, npu_grouped_matmul, npu_rms_norm,
    npu_rotary_mul, npu_scatter_pa_kv_cache, npu_swiglu, npu_top_k_top_p,
)  # fmt: skip


def fake_module(device: str) -> tuple[ModuleType, list[str]]:
    """The library of a device that is not there, and the names of its calls as they come."""
    library, called = ModuleType("torch_npu"), list[str]()

    def checked(op: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            called.append(name)
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, Tensor):
                    need(str(tensor.device) == device, name, f"a tensor on {tensor.device}")
            return op(*args, **kwargs)

        return call

    for op in OPS:
        setattr(library, op.__name__, checked(op, op.__name__))
    attention: Any = library.npu_fused_infer_attention_score
    attention.out = checked(fused_infer_attention_out, "npu_fused_infer_attention_score.out")
    workspace = checked(get_max_workspace, "get_max_workspace")
    library._npu_fused_infer_attention_score_get_max_workspace = workspace  # type: ignore[attr-defined]
    library.npu = ModuleType("npu")  # type: ignore[attr-defined]
    return library, called
