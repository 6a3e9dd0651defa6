"""Qwen3 (dense): Llama with an RMS norm on every head of q and k before rotary."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Self

from torch import Tensor

from ..common.checkpoint.fields import Fields
from ..platforms.interface_kernels import Problem
from .layers import Build, HeadNorm
from .llama import LlamaArgs, LlamaAttention, LlamaModel, Rotary
from .windows import qwen_windows


class Qwen3Args(LlamaArgs):
    @classmethod
    def read(cls, fields: Fields, **more: Any) -> Self:
        windows = qwen_windows(fields, fields.positive("num_hidden_layers"))
        return super().read(fields, windows=windows, mlp_bias=False, **more)


class Qwen3Attention(LlamaAttention):
    def __init__(self, args: LlamaArgs, layer: int, build: Build) -> None:
        super().__init__(args, layer, build)
        self.q_norm = HeadNorm(args.head_dim, args.eps, build)
        self.k_norm = HeadNorm(args.head_dim, args.eps, build)

    def rotate(self, q: Tensor, k: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        weights = self.q_norm.weight, self.k_norm.weight
        q, k = self.ops.qk_norm_rope(q, k, *weights, self.q_norm.eps, *rotary)
        return q, k

    def problems(self) -> Iterable[Problem]:
        for problem in super().problems():
            yield Problem("qk_norm_rope", problem.dtype, problem.dims)


class Qwen3Model(LlamaModel):
    args_class: type[LlamaArgs] = Qwen3Args
    attention_class = Qwen3Attention
