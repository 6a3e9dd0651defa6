"""A model of one of our families from its configuration alone: weights from a seed, on any device.
Needs neither a checkpoint nor transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from sixfold.common.checkpoint.fields import Fields
from sixfold.models.base import Model
from sixfold.models.layers import Layer
from sixfold.models.loading import build_model, kernel_problems
from sixfold.platforms.interface_kernels import KernelTable, Problem

BLOCK = 1_000_003
"""Random values that are repeated to fill a parameter; a prime, so that rows differ."""


class RandomSource:
    """ModelSource. Activations stay near 1: matrices are scaled by their width."""

    name = "random"
    stored_dtype = ""

    def __init__(self, config: Mapping[str, Any], seed: int = 0) -> None:
        self._seed = seed
        self.vocab_size = int(config["vocab_size"])
        self.context_length = int(config["max_position_embeddings"])
        where = Path("config.json")
        self._checkpoint: Any = SimpleNamespace(
            architecture=config["model_type"], fields=Fields(config, where), config_file=where
        )

    def kernel_problems(self, dtype: str, quantize: str) -> Sequence[Problem]:
        return kernel_problems(self._checkpoint, dtype, _made(quantize))

    def build(self, ops: KernelTable, dtype: torch.dtype, quantize: str) -> Model:
        return build_model(self._checkpoint, ops, dtype, _made(quantize))

    def load(self, model: Model, to_device: Callable[[Tensor], Tensor], progress: Any) -> None:
        generator = torch.Generator().manual_seed(self._seed)
        most = max(parameter.numel() for parameter in model.parameters())
        block = to_device(torch.randn(min(BLOCK, most), generator=generator))
        for number, module in enumerate(model.modules()):
            for leaf, meta in list(module.named_parameters(recurse=False)):
                value = _fill(meta, block.roll(number + 7 * len(leaf)))
                setattr(module, leaf, nn.Parameter(value, requires_grad=False))
            for leaf, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, leaf, to_device(buffer))
        for module in model.modules():
            if isinstance(module, Layer):
                module.prepare()


def _made(quantize: str) -> str:
    """There are no files, so nothing is stored in a form of its own."""
    return "" if quantize == "stored" else quantize


def _fill(meta: Tensor, block: Tensor) -> Tensor:
    """Matrices of spread 1 / sqrt(width), vectors near 1."""
    values = block.to(meta.dtype).repeat(-(-meta.numel() // len(block)))
    values = values[: meta.numel()].view(meta.shape)
    return 1 + 0.2 * values if meta.dim() == 1 else values * meta.shape[-1] ** -0.5
