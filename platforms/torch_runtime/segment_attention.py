"""Generic kernel of attention inside segments."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own spelling)
from torch import Tensor


def segment_attention(
    q: Tensor, k: Tensor, v: Tensor, starts: tuple[int, ...], scale: float
) -> Tensor:
    """One call of torch's attention per segment: no mask of all against all."""
    result = torch.empty_like(q, memory_format=torch.contiguous_format)
    for begin, end in pairwise(starts):
        if begin < end:
            here, keys, values = (x[begin:end].transpose(0, 1).unsqueeze(0) for x in (q, k, v))
            seen = F.scaled_dot_product_attention(here, keys, values, scale=scale)
            result[begin:end] = seen[0].transpose(0, 1)
    return result
