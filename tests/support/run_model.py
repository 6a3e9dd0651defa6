"""Loads one of our models and runs it over a dense cache, as tests need it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from dense_attend import DenseAttend
from reference_kernels import reference_table
from torch import Tensor

from sixfold.common.checkpoint.checkpoint import open_checkpoint
from sixfold.models.base import Model
from sixfold.models.loading import build_model, load_weights
from sixfold.platforms.interface_kernels import KernelTable


def load(path: Path, table: KernelTable | None = None, dtype: torch.dtype = torch.float32) -> Model:
    checkpoint = open_checkpoint(path)
    model = build_model(checkpoint, table or reference_table(), dtype)
    load_weights(model, checkpoint, lambda tensor: tensor)
    return model


def logits(model: Model, token_ids: Tensor, chunks: Sequence[int] = ()) -> Tensor:
    """(T, vocabulary) for one sequence, given to the model in pieces of these sizes."""
    attend = DenseAttend(model.attention_specs())
    sizes = list(chunks) or [len(token_ids)]
    positions = torch.arange(len(token_ids))
    parts = zip(token_ids.split(sizes), positions.split(sizes), strict=True)
    with torch.inference_mode():
        return torch.cat([model.logits(model(t, p, attend)) for t, p in parts])


def greedy(model: Model, prompt: Sequence[int], steps: int) -> list[int]:
    """The next `steps` tokens by argmax, over a cache, never stopping."""
    attend = DenseAttend(model.attention_specs())
    new, done, result = list(prompt), 0, []
    with torch.inference_mode():
        for _ in range(steps):
            positions = torch.arange(done, done + len(new))
            hidden = model(torch.tensor(new), positions, attend)
            done += len(new)
            new = [int(model.logits(hidden[-1:]).argmax())]
            result += new
    return result
