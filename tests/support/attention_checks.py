"""Attention backends of the cpu platform on cases of the `attention` contract."""

from __future__ import annotations

import numpy as np
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
