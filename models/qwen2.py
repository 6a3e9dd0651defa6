"""Qwen2 and Qwen2.5 (dense): Llama with biases on q, k and v, and windows on request."""

from __future__ import annotations

from typing import Any, Self

from ..common.checkpoint.fields import Fields
from .llama import LlamaArgs, LlamaModel
from .windows import qwen_windows


class Qwen2Args(LlamaArgs):
    @classmethod
    def read(cls, fields: Fields, **more: Any) -> Self:
        windows = qwen_windows(fields, fields.positive("num_hidden_layers"))
        fixed: dict[str, Any] = {"qkv_bias": True, "output_bias": False, "mlp_bias": False}
        return super().read(fields, windows=windows, **fixed, **more)


class Qwen2Model(LlamaModel):
    args_class = Qwen2Args
