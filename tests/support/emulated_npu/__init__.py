"""An emulator of `torch_npu` on CPU tensors: the ops that `platforms/npu` calls, behind the real
schemas, with the argument checks of their documentation.

Parameters and defaults are those of torch_npu 2.13.0's registered schemas. What is checked is what
the pages of Ascend's op-plugin repository say (`docs/context/torch_npu-<op>.md`) for the Atlas A2
and A3 products (910B, 910C); each op names its page. Where a page is silent, the emulator refuses:
an argument is used here only as documented. Arithmetic is float32, rounded once, so a pass says
that calls are well formed and mean the right thing, and nothing of the device's own numerics.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from .attention import (
    fused_infer_attention_out,
    get_max_workspace,
    npu_fused_infer_attention_score,
)
from .cache import npu_scatter_pa_kv_cache
from .checks import NPUError
from .graphs import Runtime
from .matmul import (
    npu_convert_weight_to_int4pack,
    npu_dynamic_quant,
    npu_grouped_matmul,
    npu_quant_matmul,
    npu_weight_quant_batchmatmul,
)
from .pointwise import npu_add_rms_norm, npu_rms_norm, npu_rotary_mul, npu_swiglu
from .sampling import npu_top_k_top_p

__all__ = ["OPS", "NPUError", "install", "module"]

OPS = (
    npu_add_rms_norm,
    npu_convert_weight_to_int4pack,
    npu_dynamic_quant,
    npu_fused_infer_attention_score,
    npu_grouped_matmul,
    npu_quant_matmul,
    npu_rms_norm,
    npu_rotary_mul,
    npu_scatter_pa_kv_cache,
    npu_swiglu,
    npu_top_k_top_p,
    npu_weight_quant_batchmatmul,
)


def module() -> ModuleType:
    """A new one, with streams and graphs of its own."""
    emulator, runtime = ModuleType("torch_npu"), Runtime()
    for op in OPS:
        setattr(emulator, op.__name__, runtime.wrapped(op))
    attention: Any = emulator.npu_fused_infer_attention_score
    attention.out = runtime.wrapped(fused_infer_attention_out, f"{attention.__name__}.out")
    emulator._npu_fused_infer_attention_score_get_max_workspace = get_max_workspace
    emulator.npu = runtime.namespace()
    return emulator


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the time of a test, `import torch_npu` gives the emulator."""
    monkeypatch.setitem(sys.modules, "torch_npu", module())
