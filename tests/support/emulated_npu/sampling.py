"""What top-k and top-p leave of logits. Page: op-plugin, `torch_npu-npu_top_k_top_p.md`, its
formulas in their order. The schema has p and k optional; the page calls them required."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import FLOATS, NPUError, dtype_of, need

MOST = 1024


def npu_top_k_top_p(logits: Tensor, p: Tensor | None = None, k: Tensor | None = None) -> Tensor:
    op = "npu_top_k_top_p"
    if p is None or k is None:
        raise NPUError(f"{op}: p and k are required by its page")
    dtype_of(op, "logits", logits, FLOATS)
    need(logits.dim() == 2, op, f"logits has {logits.dim()} axes, not 2")
    need(logits.numel() > 0, op, "empty logits are not documented")
    need(not bool(logits.isnan().any()), op, "of logits that are no numbers the page says nothing")
    need(p.dtype == logits.dtype, op, f"p is {p.dtype}, logits {logits.dtype}")
    dtype_of(op, "k", k, (torch.int32,))
    rows, vocab = logits.shape
    for name, tensor in (("p", p), ("k", k)):
        need(tuple(tensor.shape) == (rows,), op, f"{name} is ({rows},), not {tuple(tensor.shape)}")
    need(bool(((p >= 0) & (p <= 1)).all()), op, "p is within [0, 1]")
    most = min(MOST, vocab)
    need(bool(((k >= 1) & (k <= most)).all()), op, f"k is within [1, {most}]")
    ordered, places = torch.sort(logits.float(), dim=-1, stable=True)
    threshold = ordered.gather(1, (vocab - k.long()).unsqueeze(1))
    ordered = ordered.masked_fill(ordered < threshold, -torch.inf)
    reached = torch.softmax(ordered, dim=-1).cumsum(dim=-1)
    dropped = reached <= 1 - p.float().unsqueeze(1)
    dropped[:, -1] = False
    ordered = ordered.masked_fill(dropped, -torch.inf)
    return torch.empty_like(ordered).scatter_(1, places, ordered).to(logits.dtype)
