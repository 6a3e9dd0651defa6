"""Names of dtypes as the contracts spell them, and torch's objects."""

from __future__ import annotations

import torch

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

KV_DTYPES = {**DTYPES, "int8": torch.int8}
"""What keys and values may be kept in. An int8 row of a head ends with its float32 scale."""
