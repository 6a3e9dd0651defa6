"""Attention backends of the cpu platform on cases of the `attention` contract, and how any is given
views."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from support.kernel_checks import cpu_device

from sixfold.platforms.interface_attention import AttentionBackend
from sixfold.platforms.interface_kernels import Case
from sixfold.platforms.torch_runtime.attention import SdpaAttention
from sixfold.platforms.torch_runtime.conformance import TorchRunner, to_numpy
from sixfold.platforms.torch_runtime.pools import TorchKVPool


def cpu_backends() -> list[AttentionBackend]:
    return [SdpaAttention(cpu_device())]


def run_case(
    backend: AttentionBackend, case: Case, dtype: str, kv_dtype: str = ""
) -> tuple[np.ndarray, TorchKVPool]:
    """(T, heads, dim) and the pool afterwards."""
    result, pool = TorchRunner(cpu_device()).attend(backend, case, dtype, kv_dtype)
    return to_numpy(result), pool


class CutFromOneProduct:
    """A backend that is given queries, keys and values as views into one tensor, as a model whose
    projection is one product cuts them."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def run(self, bound: Any, pool: Any, layer: int, q: Any, k: Any, v: Any, *given: Any) -> Any:
        whole = torch.cat([part.flatten(1) for part in (q, k, v)], dim=1)
        sizes = [part[0].numel() for part in (q, k, v)]
        cut = [
            view.unflatten(1, part.shape[1:])
            for view, part in zip(whole.split(sizes, dim=1), (q, k, v), strict=True)
        ]
        return self._backend.run(bound, pool, layer, *cut, *given)
